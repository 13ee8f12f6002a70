"""Bake a SentenceTransformers model into a bundle: load it, trace it to OpenVINO, check its
vectors, write the folder.

    python bake_model.py MODEL [--name NAME] [--output models] …

MODEL is a name on the Hugging Face hub (multi-qa-MiniLM-L6-cos-v1, intfloat/e5-base-v2) or a
folder. Runs at image build; serving needs nothing of what this imports.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import itertools
import os
import pathlib
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from embeddings import TextEmbedder, TextLimits, load_tokenizer
from engine import bundle as bundles
from engine.batching import Batcher
from engine.bundle import (
    PARITY_FLOOR,
    PRECISIONS,
    Bundle,
    Manifest,
    Parity,
    Precision,
    Probe,
)
from engine.errors import EmbedderError
from engine.openvino_backend import OpenVINOTextEngine, available_precisions

Float32 = npt.NDArray[np.float32]

PROBE_TEXT = "The quick brown fox jumps over the lazy dog."
PARITY_TEXTS = 120
PARITY_BATCH_TOKENS = 2048
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bake stopped; nothing was written"))
    try:
        made = bake(options)
    except (BakeError, EmbedderError) as error:
        sys.exit(f"cannot bake {options.model}: {error}")
    except KeyboardInterrupt:
        sys.exit("bake stopped; nothing was written")
    print(summary(made))


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
        "--trust-remote-code", action="store_true", help="run code that comes with the model"
    )
    parser.add_argument(
        "--precisions",
        type=lambda text: [_precision(part) for part in text.split(",")],
        default=list(PRECISIONS),
        help="graphs to bake and check, comma-separated (default: fp32,bf16,int8)",
    )
    return parser


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
    name = options.name or pathlib.PurePath(options.model.rstrip("/")).name
    if not bundles.valid_name(name):
        raise BakeError(
            f"{name!r} cannot name a bundle (letters, digits, . - _); give one with --name"
        )
    with stage(f"loading {options.model}"):
        model = load(options)
        pipeline = _pipeline(model)
        window = model.max_seq_length = _window(model, options.max_tokens)
        tokenizer = _tokenizer(model, options.tokenizer)
        prompt = (
            model.prompts.get(model.default_prompt_name) or "" if model.default_prompt_name else ""
        )
        room = window - len(tokenizer.encode(prompt, add_special_tokens=False).ids)
        texts = sample(tokenizer, room, PARITY_TEXTS)
        _check_tokenizer(model, tokenizer, texts)
    with stage("embedding the sample with sentence-transformers"):
        expected = _reference(model, [PROBE_TEXT, *texts])

    def fill(folder: pathlib.Path) -> Manifest:
        tokenizer.save(str(folder / bundles.TOKENIZER))
        files = [bundles.TOKENIZER]
        with stage("tracing to OpenVINO"):
            traced = trace(pipeline, model)
            files += _save(traced, folder / "text.xml")
        if "int8" in options.precisions:
            with stage("compressing weights to int8"):
                files += _save(_int8(folder / "text.xml"), folder / "text-int8.xml")
        manifest = Manifest(
            name=name,
            source=options.source or _source(model, options.model),
            revision=_revision(model),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
            modalities=["text"],
            dimensions=expected.shape[1],
            max_tokens=window,
            normalized=_is_normalize(model[-1]),
            similarity=model.similarity_fn_name,
            prompts={key: prompt for key, prompt in model.prompts.items() if prompt is not None},
            default_prompt=model.default_prompt_name,
            files=bundles.fingerprint(folder, files),
            versions=_versions(),
            probe=Probe(PROBE_TEXT, [float(value) for value in expected[0]]),
            parity={},
        )
        for precision in available_precisions():
            if precision in options.precisions:
                with stage(f"checking vectors at {precision}"):
                    manifest.parity[precision] = measure(
                        Bundle(folder, manifest), precision, texts, expected[1:]
                    )
        return manifest

    return bundles.write(options.output, name, fill)


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
            options.model,
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

    class Pipeline(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleList(modules)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            features: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
            for part in self.parts:
                features = part(features)
            embedding: torch.Tensor = features["sentence_embedding"]
            return embedding

    return Pipeline().eval()


def _window(model: Any, wanted: int | None) -> int:
    """The window in tokens: the model's own, or `wanted` within what its positions allow."""
    config = model[0].config.get_text_config()
    own = model.max_seq_length
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and limit > 0 and _positions_follow_padding(config):
        limit -= config.pad_token_id + 1
    window = wanted or own
    if window is None or window > 1_000_000:  # tokenizers without a limit state 1e30
        window = limit
    if window is None:
        raise BakeError("it states no window; give one with --max-tokens")
    if limit is not None and 0 < limit < window:
        if wanted:
            raise BakeError(
                f"--max-tokens {wanted} is more than the {limit} tokens its architecture can do"
            )
        window = limit
    if window < 4:
        raise BakeError(f"a window of {window} tokens leaves no room for text")
    return int(window)


def _positions_follow_padding(config: Any) -> bool:
    """Whether positions count from pad_token_id + 1, as in RoBERTa and its kin, which takes that
    many off the table.
    """
    return config.model_type in {
        "roberta",
        "xlm-roberta",
        "camembert",
        "mpnet",
        "xlm-roberta-xl",
        "longformer",
    }


def _tokenizer(model: Any, replacement: str | None) -> Any:
    """The model's tokenizer as the `tokenizers` library runs it, stating its padding, without
    truncation.
    """
    import tokenizers

    own = model.tokenizer
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
    if own.pad_token_id is None:
        raise BakeError("its tokenizer has no padding token")
    tokenizer.no_truncation()
    tokenizer.enable_padding(
        direction=own.padding_side, pad_id=own.pad_token_id, pad_token=own.pad_token
    )
    return tokenizer


def sample(tokenizer: Any, window: int, count: int) -> list[str]:
    """`count` texts of 1 to `window` tokens (special tokens included where they fit), evenly spread
    over that range.
    """
    plain = [len(tokenizer.encode(phrase, add_special_tokens=False).ids) for phrase in _PHRASES]
    specials = len(tokenizer.encode(_PHRASES[0]).ids) - plain[0]
    texts = []
    for number, length in enumerate(
        np.linspace(1, max(1, window - specials), count).round().astype(int)
    ):
        order = itertools.cycle(
            range(number % len(_PHRASES), number % len(_PHRASES) + len(_PHRASES))
        )
        text, tokens = "", 0
        while tokens < length:
            at = next(order) % len(_PHRASES)
            text += _PHRASES[at] + " "
            tokens += max(1, plain[at])
        # Cut back, by characters, to the longest beginning that has no more than `length` tokens.
        encoding = tokenizer.encode(text, add_special_tokens=False)
        end = encoding.offsets[min(length, len(encoding.ids)) - 1][1]
        while end > 1 and len(tokenizer.encode(text[:end], add_special_tokens=False).ids) > length:
            end -= 1
        texts.append(text[:end] if text[:end].strip() else "a")
    return texts


def _check_tokenizer(model: Any, tokenizer: Any, texts: Sequence[str]) -> None:
    for text in texts:
        own = model.preprocess([text])["input_ids"][0].tolist()
        if own != tokenizer.encode(text).ids:
            raise BakeError(
                f"the tokenizer gives other ids than the model's own, first for {text[:40]!r}"
            )


def _reference(model: Any, texts: Sequence[str]) -> Float32:
    """sentence-transformers' own vectors, with the model's default prompt."""
    vectors = model.encode(
        list(texts), batch_size=8, convert_to_numpy=True, show_progress_bar=False
    )
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
    example = {name: features[name] for name in ("input_ids", "attention_mask")}
    free = ov.PartialShape([-1, -1])
    try:
        with torch.no_grad(), warnings.catch_warnings():
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
    if len(traced.outputs) != 1 or traced.output(0).partial_shape.rank.get_length() != 2:
        raise BakeError(
            "its code cannot be traced to OpenVINO: the trace does not give one vector a text"
        )
    return traced


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

    with contextlib.redirect_stdout(
        sys.stderr if os.environ.get("BAKE_DEBUG") else open(os.devnull, "w")
    ):
        nncf.set_log_level(40)
        return nncf.compress_weights(
            ov.Core().read_model(path), mode=nncf.CompressWeightsMode.INT8_SYM
        )


def measure(
    bundle: Bundle, precision: Precision, texts: Sequence[str], expected: Float32
) -> Parity:
    """Embed the sample as serving does, in batches of mixed lengths, and compare.

    Args:
        expected: sentence-transformers' vectors, shape (len(texts), dimensions).

    Raises: BakeError below the precision's floor.
    """
    tokenizer, pad_id, pad_left = load_tokenizer(bundle)
    engine = OpenVINOTextEngine(bundle, precision, pad_id=pad_id, pad_left=pad_left, streams=1)
    batcher = Batcher(
        max_batch_size=8, max_batch_tokens=PARITY_BATCH_TOKENS, max_queue_tokens=1 << 40, threads=1
    )
    batcher.start()
    limits = TextLimits(len(texts), 1 << 30, 1 << 40)
    embedder = TextEmbedder(bundle, tokenizer, engine, batcher, limits)
    embedded = embedder.embed(texts, deadline=time.monotonic() + 24 * 3600)
    batcher.close()
    long = next((text for text, result in zip(texts, embedded) if len(result.chunks) > 1), None)
    if long is not None:
        raise BakeError(f"a text of the sample does not fit the window: {long[:40]!r}")
    actual = np.stack([result.vector for result in embedded])
    lengths = np.linalg.norm(actual, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = (actual * expected).sum(axis=1) / np.maximum(lengths, 1e-30)
    parity = Parity(float(cosines.min()), float(cosines.mean()), len(texts))
    if not parity.minimum >= PARITY_FLOOR[precision]:
        rest = ",".join(other for other in PRECISIONS if other != precision)
        raise BakeError(
            f"at {precision} its vectors are not the model's own: smallest cosine "
            f"{parity.minimum:.5f}, at least "
            f"{PARITY_FLOOR[precision]} needed (--precisions {rest} bakes it without)"
        )
    return parity


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
        rows.append((precision, text))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:{width}}  {text}" for label, text in rows)


if __name__ == "__main__":
    main()
