"""Bake a SentenceTransformers model, a CrossEncoder (reranker) or a classifier of transformers into
a bundle: load it, trace it to OpenVINO or save it for torch, check its vectors or scores, write the
folder.

    python bake_model.py MODEL [--name NAME] [--output models] …
    python bake_model.py --check BUNDLE

MODEL is a name on the Hugging Face hub (multi-qa-MiniLM-L6-cos-v1, intfloat/e5-base-v2) or a
folder; all-MiniLM-L6-v2 comes with requirements.txt and needs no hub. Runs at image build; serving
needs nothing of what this imports.
"""

import argparse
import contextlib
import os
import pathlib
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence

from bake import BakeError, Options, describe
from engine import bundle as bundles
from engine.bundle import PRECISIONS, Bundle, Precision
from engine.errors import EmbedderError


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits with 1 and one line on stderr when the model cannot be baked."""
    options = _parser().parse_args(arguments, Options())
    if options.check:
        return check(options.model)
    try:
        options.name = bundle_name(options)
        if options.engine == "torch" and "int8" in (options.precisions or []):
            raise BakeError("--engine torch has no int8; leave it out of --precisions")
        with _stoppable(options.output, options.name):
            # Imports torch, which takes seconds: wrong options are refused before.
            from bake.stages import bake

            bundle, notes = bake(options)
    except (BakeError, EmbedderError, OSError) as error:
        sys.exit(f"cannot bake {options.model}: {error}")
    print(summary(bundle, notes))


def check(folder: str) -> None:
    """Print what holds of a bundle on this machine. Exits with 1 and one line on stderr when it
    cannot be read, or when something does not hold.
    """
    try:
        bundle = bundles.read(pathlib.Path(folder))
        bundle.verify()
        from bake.check import check_here

        rows, right = check_here(bundle)
    except (BakeError, EmbedderError, OSError, ImportError) as error:
        sys.exit(f"cannot check {folder}: {error}")
    print(table(rows))
    if not right:
        sys.exit(
            f"bundle {folder}: not every precision holds on this machine; serve one that does "
            "(PRECISION), or bake the model again here"
        )


@contextlib.contextmanager
def _stoppable(models_dir: pathlib.Path, name: str) -> Iterator[None]:
    """On Ctrl-C and SIGTERM, remove the unfinished bundle and end the process at once.

    An exception would be raised in whatever code runs at that moment. In OpenVINO's C++ it aborts
    the process or is reported as a fault of the model; in an import it leaves the import lock taken
    (4 of 60 interrupted bakes).
    """

    def stop(*_: object) -> None:
        bundles.clear(models_dir, name)
        os.write(2, b"\nbake stopped; nothing was written\n")
        os._exit(1)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a name on the Hugging Face hub, or a folder")
    help = "bake nothing: MODEL is a bundle, and what is measured is which of it holds here"
    add("--check", action="store_true", help=help)
    add("--name", help="what the service calls it (default: the last part of MODEL)")
    add("--source", help="where it comes from, for the manifest (default: MODEL)")
    add("--revision", help="branch, tag or commit on the hub")
    help = "tokenizer to use; must give the model's own ids"
    add("--tokenizer", metavar="NAME_OR_DIR", help=help)
    add("--output", type=pathlib.Path, default=pathlib.Path("models"), metavar="DIR")
    add("--max-tokens", type=int, help="window, in tokens (default: the model's own)")
    help = "a prompt beside the model's own, such as query='query: '; may be repeated"
    add("--prompt", action="append", type=_prompt, default=[], metavar="NAME=TEXT", help=help)
    add("--default-prompt", metavar="NAME", help="the prompt of requests that name none")
    help = "what makes one vector of a text's tokens, where the model does not say (transformers)"
    add("--pooling", choices=["mean", "cls", "lasttoken", "max"], help=help)
    help = "which route to bake of a model with a Router (query, document); each is a bundle"
    add("--route", metavar="NAME", help=help)
    help = "normalise layer-wise before `dimensions` cuts, as nomic-embed-text-v1.5 wants it"
    add("--layer-norm", action="store_true", help=help)
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    help = (
        "what runs the model: OpenVINO (and the service's own engine, where it can), or torch, "
        "which runs what sentence-transformers does but needs it installed (default: auto, which "
        "is torch where tracing to OpenVINO fails)"
    )
    add("--engine", choices=["auto", "openvino", "torch"], default="auto", help=help)
    help = (
        "what it may be served at, comma-separated (default: fp32,bf16,int8; torch: fp32, and bf16 "
        "where its vectors allow); fp32 is always baked and checked, it shows that the trace is "
        "right"
    )
    add("--precisions", type=_precisions, help=help)
    return parser


def _prompt(argument: str) -> tuple[str, str]:
    name, equals, text = argument.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{argument!r} is not of the form NAME=TEXT")
    return name, text


def _precisions(argument: str) -> list[Precision]:
    wanted = argument.split(",")
    for each in wanted:
        if each not in PRECISIONS:
            raise argparse.ArgumentTypeError(f"{each!r} is not one of {', '.join(PRECISIONS)}")
    return [precision for precision in PRECISIONS if precision in {"fp32", *wanted}]


def bundle_name(options: Options) -> str:
    """--name, else the last part of MODEL.

    Raises: BakeError when a bundle cannot have that name.
    """
    name = options.name or pathlib.PurePath(options.model.rstrip("/")).name
    if not bundles.valid_name(name):
        raise BakeError(
            f"{name!r} cannot name a bundle (letters, digits, . - _); give one with --name"
        )
    return name


def summary(bundle: Bundle, notes: Sequence[str] = ()) -> str:
    """A table of what was baked, and `notes` below it."""
    manifest = bundle.manifest
    prompts = [f"{name}={prompt!r}" for name, prompt in manifest.prompts.items() if prompt]
    rows = {
        "bundle": str(bundle.path),
        "source": f"{manifest.source} {manifest.revision or ''}".strip(),
        "task": manifest.task,
        "dimensions": f"{manifest.dimensions}{', normalised' if manifest.normalized else ''}",
        "window": f"{manifest.max_tokens} tokens",
        "prompts": ", ".join(prompts) or "none",
    }
    if manifest.scorer:
        del rows["dimensions"], rows["prompts"]
        rows["labels"] = ", ".join(manifest.scorer.labels)
        rows["activation"] = manifest.scorer.activation
    sizes: dict[str, int] = {}
    for name, file in manifest.files.items():
        part = name.partition("/")[0]
        sizes[part] = sizes.get(part, 0) + file.size
    rows |= {part: f"{size / 1e6:.1f} MB" for part, size in sizes.items()}
    if manifest.torch:
        traits = {"with code of its own": manifest.torch.code, "unpadded": manifest.torch.packed}
        rows["engine"] = ", ".join(["torch", *(name for name, has in traits.items() if has)])
    for precision in PRECISIONS:
        rows |= _certificates(bundle, precision)
    return "\n".join([table(rows), *(f"note: {note}" for note in notes)])


def table(rows: Mapping[str, str]) -> str:
    """Lines of two columns."""
    width = max(map(len, rows))
    return "\n".join(f"{label:{width}}  {text}" for label, text in rows.items())


def _certificates(bundle: Bundle, precision: Precision) -> dict[str, str]:
    """A row for each engine that serves the bundle at a precision."""
    manifest, rows = bundle.manifest, {}
    for backend in bundle.backends(precision):
        parities = manifest.parity.get(backend, {}), manifest.image_parity.get(backend, {})
        found = [each[precision] for each in parities if precision in each]
        said = "not checked: this CPU cannot run it; the first start on one that can does"
        rows[f"{precision}, {backend}"] = describe(found, manifest.task) if found else said
    return rows or {precision: "not baked"}


if __name__ == "__main__":
    main()
