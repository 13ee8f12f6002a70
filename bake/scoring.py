"""Bake a model that gives scores: a reranker (one score of a query and a document), or a classifier
(a score for each label of a text or a pair).
"""

import datetime
import inspect
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from bake import BakeError, CannotTrace, Options, refusing, source, stage, windows
from bake.samples import PHRASES, PROBE_TEXT, Sample, beginning, sample_texts
from engine import bundle as bundles
from engine.bundle import PRECISIONS, ScoreActivation, Bundle, Manifest, Probe, Scorer
from engine.certificate import BelowFloor
from engine.protocol import TYPE_BITS
from tokens import PairTokenizer, TextTokenizer, load_tokenizer

Float32 = npt.NDArray[np.float32]
PAIRS = 200  # in the sample
PROBE_QUERY = "Which animal jumps over the dog?"
QUERY_SHARE = 4  # a query of the sample has at most this part of the window
BATCH = 8  # of sentence-transformers
_ACTIVATIONS: dict[str, ScoreActivation] = {
    "Sigmoid": "sigmoid",
    "Softmax": "softmax",
    "Identity": "none",
}


def bake(
    options: Options,
    kind: Literal["CrossEncoder", "plain"],
    note: Callable[[str], None],
    versions: dict[str, str],
) -> Bundle:
    """Make one bundle. Raises: BakeError, EmbedderError; nothing is left behind."""
    _check_options(options)
    with stage(f"loading {options.model}"):
        model = source.load_scorer(options)
        tokenizer = source.tokenizer(model, options.tokenizer)
        activation = _activation(model, kind)
        taken = inspect.signature(model[0].model.forward).parameters
        types = "token_type_ids" in {*model.preprocess([("a", "a")])} & taken.keys()
        inputs = _sample(tokenizer, model.max_seq_length, pairs=model.num_labels == 1)
    with stage("scoring the sample with sentence-transformers"):
        sample = Sample("text", inputs, reference(model, inputs))
    spread = float(np.ptp(sample.expected, axis=0).max())
    if not np.isfinite(sample.expected).all() or not spread > 0:
        raise BakeError("it gives the same score to every text, or none that is a number")
    scorer = Scorer(labels=_labels(model), activation=activation, types=types, spread=spread)
    note(_said(model, kind, scorer))

    def fill(folder: pathlib.Path) -> Manifest:
        tokenizer.save(str(folder / bundles.TOKENIZER))
        bundle = Bundle(folder, _manifest(options, model, sample, scorer, versions))
        bundle.record([bundles.TOKENIZER])
        ids = served_ids(bundle, model, inputs)
        with refusing("OpenVINO and nncf cannot be used"):
            from bake import traced
        try:
            return traced.complete_scorer(bundle, options, model, tokenizer, sample, ids, note)
        except (CannotTrace, BelowFloor) as error:
            raise BakeError(
                f"{error}: not supported; bake another reranker or classifier"
            ) from None

    return bundles.write(options.output, options.name, fill)


def _check_options(options: Options) -> None:
    """Raises: BakeError for options that mean nothing for scores."""
    given: Mapping[str, object] = {
        "--pooling": options.pooling,
        "--route": options.route,
        "--layer-norm": options.layer_norm,
        "--prompt": options.prompt,
        "--default-prompt": options.default_prompt,
        "--engine torch": options.engine == "torch",
    }
    for name, value in given.items():
        if value:
            raise BakeError(f"it gives scores, not vectors: leave out {name}")


def _activation(model: Any, kind: Literal["CrossEncoder", "plain"]) -> ScoreActivation:
    """What the model makes of raw scores: as CrossEncoder.predict does; of a plain transformers
    model with several labels, as transformers' pipelines do.

    Raises: BakeError for an activation that serving does not have.
    """
    if kind == "plain" and model.num_labels > 1:
        several = model.config.problem_type == "multi_label_classification"
        return "sigmoid" if several else "softmax"
    name = type(model.activation_fn).__name__
    if name not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise BakeError(f"its activation is {name}: not supported (but {known})")
    return _ACTIVATIONS[name]


def _labels(model: Any) -> list[str]:
    names = model.config.id2label or {}
    return [str(names.get(number, f"LABEL_{number}")) for number in range(model.num_labels)]


def _said(model: Any, kind: str, scorer: Scorer) -> str:
    """What the bake made of the model, for the user."""
    what = "a CrossEncoder" if kind == "CrossEncoder" else type(model[0].model).__name__
    if len(scorer.labels) == 1:
        return f"it is {what} with one label: baked as a reranker (activation: {scorer.activation})"
    shown = ", ".join(scorer.labels[:5]) + (", …" if len(scorer.labels) > 5 else "")
    return (
        f"it is {what} with {len(scorer.labels)} labels ({shown}): baked as a classifier "
        f"(activation: {scorer.activation})"
    )


def _sample(tokenizer: Any, window: int, pairs: bool) -> list[Any]:
    """The inputs of the sample, the probe first: pairs of a query and a document, from one token of
    a document to the whole window; without `pairs` every other is a text alone.

    Raises: BakeError when the window leaves no room for a pair.
    """
    around = len(tokenizer.encode("a", "a").ids) - 2 * len(
        tokenizer.encode("a", add_special_tokens=False).ids
    )
    single = len(tokenizer.encode("").ids)
    most = max(1, (window - around) // QUERY_SHARE)
    queries = [beginning(each, tokenizer, "", most + single) for each in (PROBE_QUERY, *PHRASES)]
    longest = max(len(tokenizer.encode(each, add_special_tokens=False).ids) for each in queries)
    room = window - around - longest + single  # of a document that is encoded alone
    if room <= single:
        raise BakeError(f"a window of {window} tokens leaves no room for a pair; see --max-tokens")
    documents = [beginning(PROBE_TEXT, tokenizer, "", room)]
    documents += sample_texts(tokenizer, "", room, PAIRS - 1)
    return [
        (queries[number % len(queries)], document) if pairs or number % 2 == 0 else document
        for number, document in enumerate(documents)
    ]


def reference(model: Any, inputs: Sequence[Any]) -> Float32:
    """sentence-transformers' raw scores of texts and pairs, shape (len(inputs), labels): what
    CrossEncoder.predict gives to its activation.

    Raises: BakeError when the model's code fails, and when there is not enough memory.
    """
    windows.check_memory(model, blockwise=False)
    size = len("".join(max(inputs, key=lambda each: len("".join(each)))))
    progress = windows.Progress(len(inputs))
    rows: dict[int, Float32] = {}
    for paired in (True, False):
        numbers = [at for at, each in enumerate(inputs) if isinstance(each, str) != paired]
        numbers.sort(key=lambda at: -len("".join(inputs[at])))
        count = min(BATCH, max(1, windows.BATCH_CHARACTERS // size))
        for first in range(0, len(numbers), count):
            batch = numbers[first : first + count]
            with refusing("sentence-transformers itself fails to score texts with it"):
                with torch.inference_mode():
                    scores = model(model.preprocess([inputs[at] for at in batch]))["scores"]
            rows |= dict(zip(batch, scores.reshape(len(batch), -1).float().numpy()))
            progress.add(len(batch))
    return np.stack([rows[at] for at in range(len(inputs))]).astype(np.float32)


def served_ids(bundle: Bundle, model: Any, inputs: Sequence[Any]) -> list[npt.NDArray[np.int64]]:
    """Each input as serving gives it to an engine, shape (tokens,).

    Raises: BakeError when these are not the model's own tokens, and for a tokenizer that serving
        cannot use.
    """
    scorer, (made, _, _) = bundle.manifest.scorer, load_tokenizer(bundle)
    assert scorer
    found = []
    with refusing("serving cannot make its pairs of texts; bake a model with another tokenizer"):
        tokenizer = PairTokenizer(made, types=scorer.types)
        for each in inputs:
            first, text = (None, each) if isinstance(each, str) else each
            which = tokenizer if first is None else tokenizer.beside(first)
            found.append(_ids(which, text))
            own = model.preprocess([each])
            expected = own["input_ids"][0].numpy()
            if scorer.types:
                expected = expected | own["token_type_ids"][0].numpy() << TYPE_BITS
            if found[-1].tolist() != expected.tolist():
                raise ValueError(
                    f"its tokenizer gives other ids than the model's for {text[:40]!r}"
                )
    return found


def _ids(tokenizer: TextTokenizer, text: str) -> npt.NDArray[np.int64]:
    ids = tokenizer.encode_words(text)
    if ids is None:
        ids = np.array(tokenizer.encode(text).ids, np.int64)
    return tokenizer.with_special_tokens(ids)


def _manifest(
    options: Options, model: Any, sample: Sample, scorer: Scorer, versions: dict[str, str]
) -> Manifest:
    """All that is known before the bundle's files are."""
    first, text = sample.inputs[0]
    return Manifest(
        name=options.name,
        source=options.source or source.origin(options.model),
        revision=getattr(model.config, "_commit_hash", None),  # None for a folder
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
        task="rerank" if len(scorer.labels) == 1 else "classify",
        modalities=["text"],
        dimensions=len(scorer.labels),
        max_tokens=model.max_seq_length,
        normalized=False,
        similarity=None,
        prompts={},
        default_prompt=None,
        files={},
        versions=versions,
        probe=Probe(text, sample.expected[0].tolist(), first),
        precisions=list(options.precisions or PRECISIONS),
        parity={},
        scorer=scorer,
    )
