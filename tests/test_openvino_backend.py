"""engine/openvino_backend.py: padding, precisions, calls from many threads."""

import pathlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import NAME

from engine import openvino_backend
from engine.bundle import read
from engine.errors import PrecisionUnavailable
from engine.openvino_backend import OpenVINOTextEngine, available_precisions, choose_precision


@pytest.fixture(scope="module")
def engine(models_dir: pathlib.Path) -> OpenVINOTextEngine:
    return OpenVINOTextEngine(read(models_dir / NAME), "fp32", pad_id=0, pad_left=False, streams=2)


def ids(count: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    return np.concatenate([[101], np.arange(2000, 2000 + count), [102]])


def cosines(a: "np.ndarray", b: "np.ndarray") -> "np.ndarray":  # type: ignore[type-arg]
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(axis=1) / lengths  # type: ignore[no-any-return]


def test_padding_changes_no_vector(engine: OpenVINOTextEngine) -> None:
    inputs = [ids(count) for count in (1, 40, 7, 254)]
    together = engine.run(inputs)
    alone = np.concatenate([engine.run([one]) for one in inputs])
    assert together.shape == (4, 384) and together.dtype == np.float32
    assert cosines(together, alone).min() >= 0.999999


def test_calls_from_many_threads_do_not_mix(engine: OpenVINOTextEngine) -> None:
    inputs = [ids(count) for count in range(1, 60)]
    expected = np.concatenate([engine.run([one]) for one in inputs])
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            actual = np.concatenate(list(pool.map(lambda one: engine.run([one]), inputs)))
            assert cosines(actual, expected).min() >= 0.999999


def test_results_are_not_overwritten_by_the_next_call(engine: OpenVINOTextEngine) -> None:
    first = engine.run([ids(3)])
    kept = first.copy()
    engine.run([ids(9)])
    assert (first == kept).all()


def test_auto_takes_bf16_where_the_cpu_has_it_and_a_wish_is_never_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(openvino_backend, "has_bf16", lambda: True)
    assert choose_precision("auto") == "bf16"
    assert available_precisions() == ["fp32", "bf16", "int8"]
    monkeypatch.setattr(openvino_backend, "has_bf16", lambda: False)  # no CPU here is without it
    assert choose_precision("auto") == "fp32"
    assert available_precisions() == ["fp32", "int8"]
    assert [choose_precision(wanted) for wanted in ("fp32", "int8")] == ["fp32", "int8"]
    with pytest.raises(PrecisionUnavailable, match="this CPU has no bf16 arithmetic"):
        choose_precision("bf16")


def test_a_bundle_without_the_graph(models_dir: pathlib.Path) -> None:
    bundle = read(models_dir / NAME)
    for name in ("text-int8.xml", "text-int8.bin"):
        del bundle.manifest.files[name]
    with pytest.raises(PrecisionUnavailable, match=f"bundle {NAME} was baked without it"):
        OpenVINOTextEngine(bundle, "int8", pad_id=0, pad_left=False, streams=1)
