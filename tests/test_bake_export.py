"""bake/export.py: every architecture gives its own vectors; what cannot be traced is refused."""

import pathlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openvino as ov
import pytest
import tiny_code
import tiny_models as tiny
import torch
from baking import bake, cosines, embed, refusal, serving
from conftest import NAME
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Module

from engine.bundle import Bundle, read
from tokens import load_tokenizer


@dataclass
class Case:
    """A model of the table: how it is made, and what its bundle must say."""

    make: Callable[[], tiny.Made]
    pooling: Any
    heads: Callable[[], Sequence[Module]] = tuple
    normalize: bool = True
    dimensions: int = tiny.WIDTH
    pad: tuple[int, bool] = (0, False)  # id, and whether on the left
    options: list[str] = field(default_factory=list)


CASES = {
    "bert": Case(tiny.bert, "mean"),
    "bert-two-poolings": Case(
        tiny.bert, ("weightedmean", "max"), normalize=False, dimensions=2 * tiny.WIDTH
    ),
    "roberta": Case(tiny.roberta, "cls", lambda: [Dense(tiny.WIDTH, 24)], True, 24, (1, False)),
    "roberta-left": Case(tiny.roberta_left, "mean", pad=(1, True)),
    "xlm-roberta": Case(tiny.xlm_roberta, "mean", pad=(1, False)),
    "mpnet": Case(tiny.mpnet, "mean", normalize=False, pad=(1, False)),
    "distilbert": Case(tiny.distilbert, "max"),
    "modernbert": Case(tiny.modernbert, "cls"),
    "deberta-v2": Case(tiny.deberta, "mean_sqrt_len_tokens", normalize=False),
    "t5": Case(tiny.t5, "mean", options=["--max-tokens", str(tiny.WINDOW)]),
    "qwen3": Case(tiny.qwen3, "lasttoken", pad=(0, True)),
    "gemma3": Case(tiny.gemma3, "lasttoken", normalize=False, pad=(0, True)),
    "embedding-gemma": Case(
        tiny.embedding_gemma,
        "mean",
        lambda: [Dense(tiny.WIDTH, 64), Dense(64, 24, bias=False)],
        dimensions=24,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bundle_gives_the_models_own_vectors(name: str, tmp_path: pathlib.Path) -> None:
    case = CASES[name]
    torch.manual_seed(0)  # for the heads
    folder = tiny.save(
        tmp_path / name, case.make, case.pooling, heads=case.heads(), normalize=case.normalize
    )
    bundle = bake(folder, tmp_path / "models", *case.options)
    manifest = bundle.manifest
    assert manifest.dimensions == case.dimensions
    assert manifest.normalized == case.normalize
    assert manifest.max_tokens == tiny.WINDOW
    assert load_tokenizer(bundle)[1:] == case.pad

    model = SentenceTransformer(str(folder), device="cpu")
    expected = model.encode(tiny.TEXTS)
    apart = cosines(expected[:, None], expected[None])[~np.eye(len(expected), dtype=bool)]
    assert apart.max() < 0.995, "the texts' vectors are too alike to tell right from wrong"
    with serving(bundle) as (embedder, engine):
        served = embed(embedder, tiny.TEXTS)
        lone = np.concatenate([embed(embedder, [text]) for text in tiny.TEXTS])
        # One engine call for all, as unequal as they are: the Queue alone would not pad so much.
        inputs = [chunk.token_ids for (chunk,) in embedder.chunk(tiny.TEXTS)]
        assert len({len(ids) for ids in inputs}) > 3
        padded = engine.run(inputs)
    assert cosines(served, expected).min() >= 0.9999
    assert np.linalg.norm(served, axis=1) == pytest.approx(
        np.linalg.norm(expected, axis=1), rel=0.005
    )
    assert cosines(lone, served).min() >= 0.99999
    assert cosines(padded, lone).min() >= 0.99999


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (
            tiny_code.Untraceable,
            "how many steps I take.*: its code cannot be traced to OpenVINO; --engine torch",
        ),
        (
            tiny_code.Unconvertible,
            "bessel_j0.*: its code cannot be traced to OpenVINO; --engine torch",
        ),
        (
            tiny_code.Branching,
            r"at fp32 its vectors are not the model's own: smallest cosine -?0\.\d+",
        ),
        (
            tiny_code.Scaling,
            "at fp32 its vectors are not the model's own: their lengths are off by up",
        ),
        (
            tiny_code.Broken,
            r"there is no 'nothing of the kind': sentence-transformers itself fails to embed with "
            r"its modules \(Transformer, Pooling, Broken\); mend",
        ),
    ],
    ids=["raises", "no-conversion", "branches", "scales", "broken"],
)
def test_a_model_that_cannot_be_traced_is_refused(
    module: type[Module], says: str, tmp_path: pathlib.Path
) -> None:
    folder = tiny.save(tmp_path / "model", heads=[module()], normalize=False)
    options = ["--trust-remote-code", "--engine", "openvino"]
    line = refusal(folder, tmp_path / "models", *options)
    assert re.search(says, line), line
    assert "--precisions" not in line  # what is wrong at fp32 is wrong at all


def matrices(bundle: Bundle, graph: str) -> set[str]:
    """The types that a graph's matrices are kept in."""
    constants = (
        operation
        for operation in ov.Core().read_model(bundle.file(graph)).get_ops()
        if operation.get_type_name() == "Constant"
    )
    return {
        constant.get_output_element_type(0).get_type_name()
        for constant in constants
        if len(constant.data.shape) == 2 and min(constant.data.shape) > 1
    }


def test_weights_are_kept_in_two_bytes_or_one(models_dir: pathlib.Path) -> None:
    bundle = read(models_dir / NAME)
    assert matrices(bundle, "text.xml") == {"f16"}
    assert matrices(bundle, "text-int8.xml") == {"i8"}
