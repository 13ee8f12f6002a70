"""A bake from the first stage to the last."""

import contextlib
import datetime
import importlib.metadata
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from bake import BakeError, CannotTrace, Options, pictures, refusing, source, stage, untraced
from bake.parity import in_company, reference
from bake.samples import PROBE_TEXT, Sample, beginning, sample_pictures, sample_texts
from engine import bundle as bundles
from engine.bundle import PARITY_FLOOR, PRECISIONS, Bundle, Manifest, Preprocessing, Probe
from engine.certificate import BelowFloor

TEXTS, SHORT = 120, 8  # in the sample; of them, such as have one token of their own, two, three …
PACKAGES = ("sentence-transformers", "transformers", "torch", "openvino", "tokenizers", "nncf")
INSTEAD = (
    "So it is baked for torch instead, which serving needs then: the image gets about 1 GB larger, "
    "a start takes seconds longer, and a process takes more memory."
)


def bake(options: Options) -> tuple[Bundle, list[str]]:
    """Make one bundle.

    Returns: the bundle, in its place; what else there is to say about it, a line each, which has
        been printed to stderr.
    Raises: BakeError, EmbedderError; nothing is left behind.
    """
    notes: list[str] = []

    def note(line: str) -> None:
        print(line, file=sys.stderr)
        notes.append(line)

    if kind := source.scorer(options):
        from bake import scoring

        return scoring.bake(options, kind, note, _versions()), notes
    model, tokenizer, texts = _load(options, note)
    shortened = source.default_dimensions(model)
    sample, alone = _embedded(options, model, texts, note)
    samples, preprocessing = [sample], None
    if "image" in model.modalities:
        with stage("embedding pictures with sentence-transformers"):
            preprocessing, sample = _pictures(model, sample.expected.shape[1])
        samples.append(sample)

    def fill(folder: pathlib.Path) -> Manifest:
        tokenizer.save(str(folder / bundles.TOKENIZER))
        files = [bundles.TOKENIZER]
        if preprocessing:
            steps = msgspec.json.format(msgspec.json.encode(preprocessing), indent=1)
            (folder / bundles.PREPROCESSING).write_bytes(steps)
            files.append(bundles.PREPROCESSING)

        def begun() -> Bundle:
            bundle = Bundle(folder, _manifest(options, model, samples, shortened))
            bundle.record(files)
            return bundle

        if options.engine != "torch":
            try:
                with refusing("OpenVINO and nncf cannot be used; --engine torch bakes without"):
                    from bake import traced
                given = options, model, tokenizer, samples, preprocessing, note
                return traced.complete(begun(), *given)
            except (CannotTrace, BelowFloor) as error:
                if options.engine == "openvino":
                    raise BakeError(f"{error}; --engine torch runs it as it is") from None
                if "int8" in (options.precisions or []):
                    raise BakeError(f"{error} (torch could run it, but not at int8)") from None
                note(f"{error}. {INSTEAD}")
            _clear(folder, keep=files)
        return untraced.complete(begun(), options, model, samples, note, alone)

    return bundles.write(options.output, options.name, fill), notes


def _load(options: Options, note: Callable[[str], None]) -> tuple[Any, Any, list[str]]:
    """Returns: the model, its tokenizer, and the sample's texts. Raises: BakeError."""
    with stage(f"loading {options.model}"):
        model, remarks = source.load(options)
        tokenizer = source.tokenizer(model, options.tokenizer)
        prompt, window = model.prompts.get(model.default_prompt_name) or "", model.max_seq_length
        texts = _texts(tokenizer, prompt, window)
        source.check_tokenizer(model, tokenizer, texts)
    for remark in remarks:
        note(remark)
    return model, tokenizer, texts


def _embedded(
    options: Options, model: Any, texts: Sequence[str], note: Callable[[str], None]
) -> tuple[Sample, bool]:
    """Returns: the sample of texts, and whether each has to be computed alone; `options` then say
    torch.

    Raises: BakeError.
    """
    with stage("embedding the sample with sentence-transformers"):
        alone = (together := in_company(model, texts)) < PARITY_FLOOR["fp32"]
        sample = Sample("text", texts, reference(model, texts, alone=alone))
    if alone:
        _choose_torch(options, together, note)
    return sample, alone


def _pictures(model: Any, numbers: int) -> tuple[Preprocessing, Sample]:
    """How the model takes pictures, and the sample of them. `numbers`: of a text's vector.

    Raises: BakeError.
    """
    preprocessing = pictures.read_processor(model)
    files = sample_pictures()
    pictures.check_processor(model, preprocessing, files)
    expected = reference(model, pictures.opened(model, files), "pictures ")
    if expected.shape[1] != numbers:
        raise BakeError(
            f"its texts have vectors of {numbers} numbers and its pictures of {expected.shape[1]}: "
            "not supported; bake a model with one space for both"
        )
    return preprocessing, Sample("image", files, expected)


def _choose_torch(options: Options, together: float, note: Callable[[str], None]) -> None:
    """For a model whose vectors depend on the padding beside other texts.

    Args:
        together: smallest cosine of a text in a batch to the same text alone.

    Raises: BakeError when the options ask for what torch has not.
    """
    what = (
        "its vectors depend on padding: sentence-transformers' own, of a text beside longer ones "
        f"and alone, have a cosine of only {together:.4f}"
    )
    if options.engine == "openvino" or "int8" in (options.precisions or []):
        raise BakeError(
            f"{what}; each text has to be computed alone, which only --engine torch does, at fp32 "
            "or bf16"
        )
    if options.engine == "auto":
        what = f"{what}. {INSTEAD[:-1]}"
    options.engine = "torch"
    note(f"{what}. Each text is computed alone, which is slower than in batches.")


def _texts(tokenizer: Any, prompt: str, window: int) -> list[str]:
    """The sample of texts, the probe first. Raises: BakeError when the prompt leaves no room."""
    least = len(tokenizer.encode(prompt).ids) + 1
    lengths = [window, *(min(window, least + more) for more in range(min(SHORT, TEXTS // 4)))]
    texts = [beginning(PROBE_TEXT, tokenizer, prompt, length) for length in lengths]
    return texts + sample_texts(tokenizer, prompt, window, TEXTS - len(texts))


def _clear(folder: pathlib.Path, keep: Sequence[str]) -> None:
    for path in folder.iterdir():
        if path.name not in keep:
            path.unlink()


def _versions() -> dict[str, str]:
    """Those of PACKAGES that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _manifest(
    options: Options, model: Any, samples: Sequence[Sample], shortened: int | None
) -> Manifest:
    """All that is known before the bundle's files are."""
    probes = {sample.modality: sample.expected[0].tolist() for sample in samples}
    return Manifest(
        name=options.name,
        source=options.source or source.origin(options.model),
        revision=getattr(model.config, "_commit_hash", None),  # None for a folder
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
        modalities=list(probes),
        dimensions=len(probes["text"]),
        default_dimensions=shortened if shortened and shortened < len(probes["text"]) else None,
        max_tokens=model.max_seq_length,
        normalized=source.modules(model)[1],
        layer_norm=options.layer_norm,
        similarity=model.similarity_fn_name,
        prompts={key: prompt for key, prompt in model.prompts.items() if prompt is not None},
        default_prompt=model.default_prompt_name,
        files={},
        versions=_versions(),
        probe=Probe(samples[0].inputs[0], probes["text"]),
        precisions=list(options.precisions or PRECISIONS),
        parity={},
        image_probe=probes.get("image"),
    )
