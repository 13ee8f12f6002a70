"""bake/parity.py: the certificate holds, and what misses a floor is refused."""

import pathlib
import re
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny_code
import tiny_models as tiny
from baking import Baked, bake, cosines, embed, refusal, serving
from conftest import NAME

from bake.export import trace_pictures
from bake.parity import measure_texts, thread_counts
from bake.traced import makers
from engine import bundle as bundles
from engine import certificate
from engine.bundle import PARITY_FLOOR, PRECISIONS
from engine.choice import runs
from engine.errors import PrecisionUnavailable
from engine.openvino_backend import OpenVINOTextEngine, available_precisions, choose_precision
from engine.protocol import Engine


@pytest.mark.parametrize("precision", available_precisions())
def test_the_real_models_certificate_holds(
    models_dir: pathlib.Path, sentence_transformer: Any, precision: bundles.Precision
) -> None:
    bundle = bundles.read(models_dir / NAME)
    parities = [each[precision] for each in bundle.manifest.parity.values() if precision in each]
    for parity in parities:
        assert PARITY_FLOOR[precision] <= parity.minimum <= parity.mean <= 1.0001
        assert parity.cases > 240 and parity.threads == thread_counts()
    with serving(bundle, precision) as (embedder, _):
        found = cosines(embed(embedder, tiny.TEXTS), sentence_transformer.encode(tiny.TEXTS))
    assert found.min() >= PARITY_FLOOR[precision]


def test_the_certificate_states_what_this_cpu_ran(models_dir: pathlib.Path) -> None:
    manifest = bundles.read(models_dir / NAME).manifest
    assert list(manifest.parity["OpenVINO"]) == available_precisions()
    own = [each for each in PRECISIONS if runs("own engine", each)]
    assert list(manifest.parity.get("own engine", {})) == own and not manifest.left_out
    assert manifest.precisions == ["fp32", "bf16", "int8"]


def test_one_engine_is_in_memory_at_a_time(baked: Baked) -> None:
    """A large model's takes gigabytes."""
    made: list[weakref.ref[Engine]] = []
    (maker,) = makers(baked.bundle, "OpenVINO", "fp32")

    def make(threads: int) -> Engine:
        assert not any(engine() for engine in made)
        engine = maker(threads)
        made.append(weakref.ref(engine))
        return engine

    assert measure_texts(baked.bundle, make, [1, 2, 3]).threads == [1, 2, 3] and len(made) == 3


def test_what_int8_spoils_is_refused_with_the_way_out(tmp_path: pathlib.Path) -> None:
    folder = tiny.save(tmp_path / "model", tiny.coarse_bert, heads=[tiny.coarse_head()])
    line = refusal(folder, tmp_path / "models", "--precisions", "fp32,int8")
    assert re.search(
        r"at int8 its vectors are not the model's own: smallest cosine -?0\.\d{5} "
        r"\(OpenVINO, .*\), at least 0.99 needed \(--precisions fp32 bakes it without\)$",
        line,
    ), line


def test_a_cosine_that_is_no_number_is_the_smallest() -> None:
    right, large = np.array([3.0, 4.0], np.float32), np.array([3e38, 3e38], np.float32)
    vectors = right, np.array([np.nan, 1]), np.array([np.inf, 0]), large, 0 * right
    found = certificate.cosines(np.array(vectors, np.float32), np.tile(right, (len(vectors), 1)))
    assert found == pytest.approx([1, -1, -1, -1, 0])


def test_the_share_of_the_nearest_ten_that_stays(baked: Baked) -> None:
    """20 texts in a row on a circle; then one's vector is where the last one is."""
    angles = np.linspace(0, 3, 20)
    expected = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    def nearest(actual: npt.NDArray[np.float32], numbers: Sequence[int]) -> float | None:
        compared = certificate.Compared(baked.bundle, expected)
        compared.add(numbers, actual[list(numbers)])
        return compared.nearest()

    numbers = range(20)
    assert nearest(expected, numbers) == 1 and nearest(3 * expected, numbers[::-1]) == 1
    moved = expected.copy()
    moved[0] = expected[19]  # finds texts 10 to 19, whose own nearest are 1 to 10
    assert nearest(moved, numbers) == pytest.approx((19 * 10 + 1) / 200)
    assert nearest(expected, numbers[1:]) is None  # not all of them
    twins = np.repeat(expected[:10], 2, axis=0)  # each has a twin that is as near
    compared = certificate.Compared(baked.bundle, twins)
    compared.add(numbers, twins[[at ^ 1 for at in numbers]])
    assert compared.nearest() == 1
    few = certificate.Compared(baked.bundle, expected[:11])
    few.add(range(11), expected[:11])
    assert few.nearest() is None


def test_a_text_that_has_no_vector_in_company_is_computed_alone(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.save(tmp_path / "model", heads=[tiny_code.Overflowing()])
    options = ["--trust-remote-code", "--max-tokens", str(tiny.WINDOW)]
    capsys.readouterr()
    bundle = bake(folder, tmp_path / "models", *options)
    assert "and alone, have a cosine of only -1.0000" in capsys.readouterr().err
    assert bundle.manifest.torch and bundle.manifest.torch.alone


def test_a_tower_that_gives_other_vectors_is_refused(
    tmp_path: pathlib.Path, tiny_clip_folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(model: Any, preprocessing: Any) -> Any:
        model[0].model.visual_projection.weight.data[0] *= -1
        return trace_pictures(model, preprocessing)

    monkeypatch.setattr("bake.traced.trace_pictures", other)
    line = refusal(tiny_clip_folder, tmp_path, "--engine", "openvino")
    assert ": at fp32 its pictures' vectors are not the model's own: smallest cosine" in line


def test_a_bundle_is_served_only_at_what_it_was_baked_for(baked: Baked) -> None:
    """`baked` is fp32 only: nobody has seen its vectors at bf16, which runs the same graph."""
    assert baked.bundle.manifest.precisions == ["fp32"]
    for precision in ("bf16", "int8"):
        with pytest.raises(PrecisionUnavailable, match="was baked without it"):
            OpenVINOTextEngine(baked.bundle, precision, pad_id=0, pad_left=False, streams=1)
    assert choose_precision("auto", baked.bundle) == "fp32"
