"""The stages of a bake, which `stages` runs in this order: `source` (find and load the model, with
`kinds`: what kind it is), `samples` and `pictures` (what its vectors are compared over), `traced`
or `untraced` (make a bundle for OpenVINO or for torch), `parity` (compare the vectors). `windows`
keeps long windows within memory, and says how much time is left. `traced` uses `export` (trace and
save), `rewrite` (make the text graph faster) and `encoder` (whether our own engine runs the model;
with `families`, its parts, and `named`, its weights). `check` compares the vectors of a bundle that
is there.
"""

import argparse
import contextlib
import pathlib
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Literal

from engine.bundle import Parity, Precision, Task

# OpenVINO's telemetry needs a network; engine/openvino_backend.py says more.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


ALIVE_EVERY = 5.0  # seconds
_CHECK = re.compile(r"^Check '|^Exception from ")  # of OpenVINO's C++


class Options(argparse.Namespace):
    """The parsed command line, see bake_model.py."""

    model: str  # a name on the Hugging Face hub, or a folder; with `check` a bundle
    check: bool
    name: str  # the bundle's
    source: str | None
    revision: str | None
    tokenizer: str | None
    output: pathlib.Path
    max_tokens: int | None
    prompt: list[tuple[str, str]]  # name and text of each
    default_prompt: str | None
    pooling: Literal["mean", "cls", "lasttoken", "max"] | None  # for a model that states none
    route: str | None  # of a model with a Router
    layer_norm: bool
    trust_remote_code: bool
    engine: Literal["auto", "openvino", "torch"]  # auto: torch where tracing fails
    precisions: list[Precision] | None  # fp32 always among them; None: all that its engine has


class BakeError(Exception):
    """Why this model cannot be baked, in one line."""


class CannotTrace(BakeError):
    """Why OpenVINO cannot run this model; sentence-transformers can."""


@contextlib.contextmanager
def refusing(then: str, kind: type[BakeError] = BakeError) -> Iterator[None]:
    """Turn any exception but a BakeError into a `kind`: its cause, and `then`: what fails by
    it, and what to do.
    """
    try:
        yield
    except BakeError:
        raise
    except Exception as error:
        raise kind(f"{one_line(error)}: {then}") from error


def one_line(error: Exception, characters: int = 300) -> str:
    """What an exception says, on one line. Of OpenVINO's, only the cause, which stands last."""
    if isinstance(error, KeyError):
        return f"there is no {error}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if any(_CHECK.search(line) for line in lines):
        lines = lines[-1:]
    said = " ".join(" ".join(lines).split())[:characters].rstrip(".:")
    return said.replace("`trust_remote_code=True`", "--trust-remote-code")


@contextlib.contextmanager
def stage(what: str) -> Iterator[None]:
    """Print a stage's name to stderr, and how long it took when it ends; on a terminal also how
    long it has taken so far.
    """
    print(f"{what} …", end="", file=sys.stderr, flush=True)
    started = time.perf_counter()
    try:
        with _alive(started) if sys.stderr.isatty() else contextlib.nullcontext():
            yield
    except BaseException:
        print(" failed", file=sys.stderr, flush=True)
        raise
    print(f" {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _alive(started: float) -> Iterator[None]:
    """Within it, print every ALIVE_EVERY seconds how many have passed: a large model is traced or
    compressed for minutes.
    """
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(ALIVE_EVERY):
            passed = time.perf_counter() - started
            print(f" {int(passed)} s …", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def describe(parities: Sequence[Parity], task: Task = "embed") -> str:
    """The certificates of texts and of pictures, or that of scores, as a user reads them."""
    if task != "embed":
        (found,) = parities
        order = "" if found.tau is None else f", order kept (Kendall's tau {found.tau:.4f})"
        return (
            f"scores off by at most {1 - found.minimum:.6f} of their spread (alone "
            f"{1 - found.alone:.6f}), mean {1 - found.mean:.6f} over {found.cases} scores{order}; "
            f"threads: {', '.join(map(str, found.threads))}"
        )
    return "; ".join(
        f"cosine at least {parity.minimum:.6f} (alone {parity.alone:.6f}), mean {parity.mean:.6f} "
        f"over {parity.cases} {inputs}"
        + ("" if parity.nearest is None else f", {parity.nearest:.1%} of the nearest ten the same")
        + f"; threads: {', '.join(map(str, parity.threads))}"
        for parity, inputs in zip(parities, ("vectors", "vectors of pictures"))
    )
