"""What tests of the bake share: baking in this process, refusals, serving what was baked."""

import contextlib
import io
import pathlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import tiny_models as tiny

import bake_model
from bake import stages
from embeddings import TextEmbedder
from engine import bundle as bundles
from engine.bundle import Bundle
from engine.openvino_backend import OpenVINOTextEngine
from engine.queue import Queue
from engine.torch_engine import TorchTextEngine, open_model
from limits import TextLimits
from tokens import load_tokenizer

Float32 = npt.NDArray[np.float32]
PROMPTS = {"query": "query: ", "passage": "passage: "}
OWN = 24  # tokens: the window that `bert` states
FAR = 60.0  # seconds; a deadline that no test meets

# Tests bake some 200 tiny models in these processes. The bundles that conftest.py shares have the
# whole sample of 120 texts.
stages.TEXTS = 40


def bake(model: pathlib.Path | str, output: pathlib.Path, *options: str) -> Bundle:
    """Bake as the command line does, in this process; at fp32 unless told otherwise."""
    if "--precisions" not in options:
        options = (*options, "--precisions", "fp32")
    bake_model.main([str(model), "--output", str(output), *options])
    name = options[options.index("--name") + 1] if "--name" in options else pathlib.Path(model).name
    bundle = bundles.read(output / name)
    bundle.verify()
    return bundle


def refusal(model: pathlib.Path | str, output: pathlib.Path, *options: str) -> str:
    """The one line on stderr of a bake that fails and writes nothing."""
    before = content(output)
    with pytest.raises(SystemExit) as info:
        bake(model, output, *options)
    line = info.value.code
    # sys.exit prints a string to stderr and ends the process with 1.
    assert isinstance(line, str) and line.startswith(f"cannot bake {model}: ") and "\n" not in line
    assert content(output) == before
    return line


def content(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too; a folder counts as a file of nothing."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


@contextlib.contextmanager
def serving(
    bundle: Bundle, precision: bundles.Precision = "fp32"
) -> Iterator[tuple[TextEmbedder, OpenVINOTextEngine]]:
    """An embedder and its engine, put together as main.py does."""
    tokenizer, pad_id, pad_left = load_tokenizer(bundle)
    engine = OpenVINOTextEngine(bundle, precision, pad_id=pad_id, pad_left=pad_left, streams=1)
    queue = Queue(max_batch_size=64, max_batch_tokens=4096, max_queue_tokens=1 << 30, threads=1)
    queue.start()
    try:
        yield TextEmbedder(bundle, tokenizer, engine, queue, TextLimits()), engine
    finally:
        queue.close()


def embed(embedder: TextEmbedder, texts: Sequence[str], prompt: str | None = None) -> Float32:
    results = embedder.embed(texts, deadline=time.monotonic() + FAR, prompt_name=prompt)
    return np.stack([result.vector for result in results])


def serves(bundle: Bundle, expected: Float32, prompt: str | None = None) -> bool:
    """Whether what is served of tiny.TEXTS, in company and alone, is `expected`."""
    if not bundle.manifest.torch:
        with serving(bundle) as (embedder, _):
            return _agree(embedder, expected, prompt)
    tokenizer, _, _ = load_tokenizer(bundle)
    engine = TorchTextEngine(open_model(bundle, device="cpu", precision="fp32", threads=1))
    queue = Queue(max_batch_size=64, max_batch_tokens=4096, max_queue_tokens=1 << 30, threads=1)
    queue.start()
    try:
        embedder = TextEmbedder(bundle, tokenizer, engine, queue, TextLimits())
        return _agree(embedder, expected, prompt)
    finally:
        queue.close()


def _agree(embedder: TextEmbedder, expected: Float32, prompt: str | None) -> bool:
    company = embed(embedder, tiny.TEXTS, prompt)
    alone = np.concatenate([embed(embedder, [text], prompt) for text in tiny.TEXTS])
    return all(cosines(vectors, expected).min() >= 0.9999 for vectors in (company, alone))


def cosines(left: Float32, right: Float32) -> Float32:
    lengths = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    result: Float32 = (left * right).sum(axis=-1) / lengths
    return result


def make_bert(folder: pathlib.Path) -> pathlib.Path:
    """A BERT with prompts, of which `query` is the default; its window is OWN of WINDOW tokens."""
    return tiny.save(folder / "bert", prompts=PROMPTS, default_prompt="query", max_tokens=OWN)


@dataclass
class Baked:
    """A bundle of `bert`, and what its bake said."""

    bundle: Bundle
    stdout: str
    stderr: str


def bake_bert(bert: pathlib.Path, output: pathlib.Path) -> Baked:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        bundle = bake(bert, output, "--source", "org/bert", "--max-tokens", "48")
    return Baked(bundle, out.getvalue(), err.getvalue())
