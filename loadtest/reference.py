"""sentence-transformers itself, for comparison: in a process of its own, since torch's threads spin
and would slow down whatever is measured in the same one.
"""

import io
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from typing import Any

from PIL import Image

from engine.bundle import Manifest
from loadtest.client import Result
from loadtest.rounds import call_repeatedly
from settings import available_cores

_model: Any = None  # in the child process


class Reference:
    """sentence-transformers with one model on all cores. Close it at the end."""

    def __init__(self, manifest: Manifest, model: str | None) -> None:
        """Args:
            model: folder or name; None means the bundle's source, if it is on this machine.

        Raises: OSError when sentence-transformers is not installed or finds no such model.
        """
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self._prompt = manifest.prompts.get(manifest.default_prompt or "")
        try:
            self._run(_load, model or manifest.source, manifest.max_tokens, model is None)
        except OSError:
            self.close()
            raise

    def encode(
        self, inputs: Sequence[Sequence[str | bytes]], concurrency: int, seconds: float
    ) -> Result:
        """Encode inputs, `concurrency` of them in one call, each given as its parts: the chunks of
        a text, or a picture's file. An input's vector is the mean of its parts'.
        """
        prompt = None if isinstance(inputs[0][0], bytes) else self._prompt
        result: Result = self._run(_encode, inputs, concurrency, seconds, prompt)
        return result

    def _run(self, work: Any, *arguments: Any) -> Any:
        try:
            return self._process.submit(work, *arguments).result()
        except BrokenExecutor:
            raise OSError("sentence-transformers ended") from None

    def close(self) -> None:
        self._process.shutdown()


def _load(name: str, window: int, offline: bool) -> None:
    """In the child process. Raises: OSError."""
    global _model
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the libraries' warnings
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import torch
        from sentence_transformers import SentenceTransformer

        from bake.source import location

        torch.set_num_threads(available_cores())
        _model = SentenceTransformer(location(name, None), device="cpu")
        _model.max_seq_length = window
    except Exception as error:
        raise OSError(f"sentence-transformers: {' '.join(str(error).split())[:200]}") from None


def _encode(
    inputs: Sequence[Sequence[str | bytes]], concurrency: int, seconds: float, prompt: str | None
) -> Result:
    """In the child process."""

    def encode(number: int) -> int:
        first = number * concurrency
        batch = [inputs[(first + at) % len(inputs)] for at in range(concurrency)]
        parts = [
            Image.open(io.BytesIO(part)) if isinstance(part, bytes) else part
            for parts in batch
            for part in parts
        ]
        vectors, at = _model.encode(parts, prompt=prompt, show_progress_bar=False), 0
        for each in batch:
            vectors[at : at + len(each)].mean(axis=0).tolist()
            at += len(each)
        return concurrency

    return call_repeatedly(encode, 1, seconds)
