"""Make a bundle for the torch engine: the model itself, its code, a sample, and the certificate."""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import huggingface_hub.constants
import msgspec
import torch

from bake import BakeError, Options, one_line, refusing, source, stage
from bake.parity import enter, leave_out, measure, write_sample
from bake.samples import Sample
from engine.bundle import SAMPLE, TORCH_MODEL, Bundle, Manifest, Parity, Precision, Torch
from engine.certificate import BelowFloor, read_sample
from engine.packing import can_pack
from engine.protocol import Engine
from engine.torch_engine import TorchImageEngine, TorchTextEngine
from engine.torch_model import Model
from tokens import load_tokenizer


def complete(
    bundle: Bundle,
    options: Options,
    model: Any,
    samples: Sequence[Sample],
    note: Callable[[str], None],
    alone: bool = False,
) -> Manifest:
    """Save and certify.

    Args:
        bundle: with its tokenizer, and PREPROCESSING where the model takes pictures.
        note: told what the user should know.
        alone: each text has to be computed without others beside it.

    Returns: the manifest, complete.
    Raises: BakeError.
    """
    manifest, folder = bundle.manifest, bundle.file(TORCH_MODEL)
    _check_vocabulary(bundle, model)
    manifest.precisions = [each for each in manifest.precisions if each != "int8"]
    with stage("saving the model"):
        source.as_published(options, manifest.revision).save(str(folder), create_model_card=False)
        code = gather_code(folder)
    manifest.torch = Torch(code=bool(code), packed=not alone and can_pack(model), alone=alone)
    for package in sorted({name.partition(".")[0] for name in code if not name.endswith(".py")}):
        note(f"it needs the package {package}, which is not part of it: serving needs that too")
    write_sample(bundle, samples)
    below = sorted(path for path in folder.rglob("*") if path.is_file())
    bundle.record([SAMPLE, *(path.relative_to(bundle.path).as_posix() for path in below)])
    with _offline():
        certify(bundle, options, samples, note)
    return manifest


def _check_vocabulary(bundle: Bundle, model: Any) -> None:
    """A GPU ends the process at an id that has no vector. Raises: BakeError."""
    tokenizer, _, _ = load_tokenizer(bundle)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    with contextlib.suppress(AttributeError, NotImplementedError):  # no transformers' model
        known = model[0].model.get_input_embeddings().num_embeddings
        if largest >= known:
            raise BakeError(
                f"its tokenizer has ids up to {largest}, but its embeddings end at {known - 1}; "
                "resize them to the tokenizer (resize_token_embeddings)"
            )


def gather_code(folder: pathlib.Path) -> list[str]:
    """Make the Python code of a saved model complete: `SentenceTransformer.save` puts a module's
    file beside its weights, but looks for it in the model's folder; and `auto_map` may still name
    classes in other repositories, or in files that were not saved, as nothing uses them.

    Returns: the code's files, and the classes in installed packages.
    Raises: BakeError for two different files of one name, and for weights that are only an adapter.
    """
    for path in list(folder.glob("*/*.py")):
        there = folder / path.name
        if there.exists() and there.read_bytes() != path.read_bytes():
            raise BakeError(
                f"its code has two different files {path.name}: not supported; rename one"
            )
        shutil.move(path, there)
    if next(folder.rglob("adapter_config.json"), None):
        raise BakeError("its weights are an adapter (PEFT); merge them into the model first")
    for path in folder.rglob("*.json"):
        settings = json.loads(path.read_text())
        if isinstance(settings, dict) and "auto_map" in settings:
            settings["auto_map"] = _local(settings["auto_map"], folder)
            path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    files = [path.name for path in folder.glob("*.py")]
    types = [module["type"] for module in json.loads((folder / "modules.json").read_text())]
    return files + [
        name
        for name in types
        if not name.startswith("sentence_transformers.") and f"{name.split('.')[0]}.py" not in files
    ]


def _local(auto_map: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    """The entries whose classes are in `folder`. A tokenizer's has two, one of them may be null."""

    def there(reference: str | None) -> bool:
        return reference is None or (folder / f"{reference.split('.')[0]}.py").exists()

    return {
        kind: value
        for kind, value in auto_map.items()
        if all(map(there, value if isinstance(value, list) else [value]))
    }


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Within it, nothing is had from the hub: the bundle must hold all that loading it takes."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def certify(
    bundle: Bundle, options: Options, samples: Sequence[Sample], note: Callable[[str], None]
) -> None:
    """Fill the manifest's parities, measured on the CPU. Where the model gives other vectors
    without padding, or fails, it is served with it. A precision below its floor, or at which its
    code fails, is left out, unless it was asked for by name.

    Raises: BakeError.
    """
    manifest = bundle.manifest
    assert manifest.torch
    for precision in list(manifest.precisions):
        try:
            with stage(f"checking vectors at {precision}"):
                try:
                    parities = certificates(bundle, precision, samples)
                except Exception:  # of whatever kind: padding shows whether packing is to blame
                    if precision != "fp32" or not manifest.torch.packed:
                        raise
                    manifest.torch = msgspec.structs.replace(manifest.torch, packed=False)
                    parities = []
                # Not above, where the exception keeps the model that failed, with all its memory.
                parities = parities or certificates(bundle, precision, samples)
        except BelowFloor as error:
            if precision == "fp32":
                advice = error.advice if isinstance(error, CodeFails) else _DEPENDS
                raise BakeError(f"{error}; {advice}") from None
            leave_out(bundle, "torch", precision, error, options, note)
        else:
            enter(bundle, "torch", precision, parities)
    manifest.precisions = [each for each in manifest.precisions if bundle.offers(each)]


class CodeFails(BelowFloor):
    """The model's code fails at a precision, such as one that its operations do not have."""

    advice = "mend it, or bake another model"


_DEPENDS = (
    "torch computes what sentence-transformers does, so they depend on more than the text (on "
    "padding, on chance): bake another model"
)


def certificates(bundle: Bundle, precision: Precision, samples: Sequence[Sample]) -> list[Parity]:
    """One for each sample, on the CPU.

    Raises: BelowFloor, CodeFails; BakeError when it cannot be loaded.
    """
    assert bundle.manifest.torch
    with refusing(
        "it cannot be loaded from what SentenceTransformer.save writes of it; mend the code of its "
        "modules (save, load), or bake another"
    ):
        model = Model(bundle, [torch.device("cpu")], precision, bundle.manifest.torch.packed)
    try:
        TorchTextEngine(model).run([read_sample(bundle).ids[0]])
    except Exception as error:  # of whatever kind: it is the model's code that runs
        raise CodeFails(f"at {precision} its code fails: {one_line(error)}") from None
    makers: list[Callable[[int], Engine]] = [lambda _: TorchTextEngine(model)]
    makers.append(lambda _: TorchImageEngine(model))
    return measure(bundle, makers, samples, [torch.get_num_threads()])
