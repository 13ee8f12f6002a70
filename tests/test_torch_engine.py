"""engine/torch_engine.py: a torch bundle on the CPU, in process and as a service; what happens when
memory does not suffice or a GPU fails. tests/gpu measures on GPUs.
"""

import base64
import json
import math
import os
import pathlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import tiny_models as tiny
import torch
from baking import bake, cosines
from servers import serve

from bake import stages
from engine import bundle as bundles
from engine import torch_engine, torch_model
from engine.bundle import Bundle, Precision
from engine.certificate import read_sample
from engine.choice import image_engine, text_engine
from engine.errors import BundleError, DeviceUnavailable, PrecisionUnavailable
from engine.packing import Packer
from engine.torch_engine import TorchTextEngine, open_model
from engine.torch_model import Model, _Replica

Float32 = npt.NDArray[np.float32]
CPU = torch.device("cpu")
TEXTS = stages.TEXTS  # as tests/baking.py sets it
LONE = len(range(0, TEXTS, TEXTS // 12))  # of them that are also computed alone
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """One model that packs, and one that cannot."""
    folder = tmp_path_factory.mktemp("models")
    tiny.save(folder / "bert", prompts={"query": "query: "}, default_prompt="query")
    tiny.save(folder / "mpnet", tiny.mpnet)
    return folder


@pytest.fixture(scope="module")
def models_dir(folder: pathlib.Path) -> pathlib.Path:
    for name in ("bert", "mpnet"):
        bake(folder / name, folder / "bundles", "--engine", "torch", "--precisions", "fp32,bf16")
    return folder / "bundles"


@pytest.fixture(scope="module")
def bundle(models_dir: pathlib.Path) -> Bundle:
    return bundles.read(models_dir / "bert")


@pytest.fixture(scope="module")
def clip(tiny_clip_folder: pathlib.Path, models_dir: pathlib.Path) -> Bundle:
    return bake(tiny_clip_folder, models_dir, "--engine", "torch")


@pytest.fixture
def ids(bundle: Bundle) -> list[Any]:
    return read_sample(bundle).ids


def open_on(bundle: Bundle, device: str = "cpu", precision: str = "fp32") -> Model:
    return open_model(bundle, device=device, precision=precision, threads=1)


def test_what_was_left_out_is_not_chosen_again(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the model that was wrong is still in use, as by texts when pictures are wrong."""
    monkeypatch.setattr(torch_engine, "_has_amx", lambda: True)
    own = msgspec.structs.replace(bundle.manifest, left_out={}, created="for this test")
    changed = Bundle(bundle.path, own)
    first = open_on(changed, precision="auto")
    assert first.precision == "bf16" and open_on(changed, precision="auto") is first
    own.left_out["torch"] = {"bf16": "its vectors are wrong here"}
    assert open_on(changed, precision="auto").precision == "fp32"
    with pytest.raises(PrecisionUnavailable):
        open_on(changed, precision="bf16")


def test_nor_on_gpus(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    left_out: dict[bundles.Backend, dict[Precision, str]] = {"torch": {}}
    own = msgspec.structs.replace(bundle.manifest, left_out=left_out)
    changed, chosen = Bundle(bundle.path, own), list[str]()
    for _ in range(3):
        chosen.append(torch_engine._open_on_gpus(changed, [CPU], "auto").precision)
        left_out["torch"][chosen[-1]] = "its vectors are wrong here"  # type: ignore[index]
    assert chosen == ["fp16", "bf16", "fp32"]
    with pytest.raises(PrecisionUnavailable):
        torch_engine._open_on_gpus(changed, [CPU], "auto")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_the_sample_gives_its_vectors_again(
    models_dir: pathlib.Path, name: str, precision: Precision
) -> None:
    bundle = bundles.read(models_dir / name)
    model = open_on(bundle, precision=precision)
    assert (model.packed, model.precision) == (name == "bert", precision)
    parity = model.measure()
    assert bundles.PARITY_FLOOR[precision] <= parity.minimum <= parity.mean <= 1.0001
    assert parity.cases == TEXTS + LONE  # all of them together, and some alone
    lengths = [len(ids) for ids in read_sample(bundle).ids]
    assert sorted(sum(torch_model._batches(lengths), [])) == list(range(TEXTS))
    assert all(
        3 * size < 4 * sum(lengths[at] for at in places) <= 4 * size
        for size in (64, 1024)
        if (places := torch_model._filling(size, lengths))
    )
    many = torch_model._filling(100_000, lengths)  # more than all of them have
    assert 90_000 < sum(lengths[at] for at in many) <= 100_000


def test_every_device_and_every_recorded_size_is_measured(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(bundle, [CPU, CPU], "fp32", True)
    model._recorded = [[64], [64, 256]]
    right, calls = _Replica.texts, list[tuple[_Replica, int]]()

    def texts(replica: _Replica, inputs: Sequence[Any]) -> Float32:
        calls.append((replica, sum(map(len, inputs))))
        return right(replica, inputs)

    monkeypatch.setattr(_Replica, "texts", texts)
    model.measure()
    first, second = ([n for each, n in calls if each is replica] for replica in model._replicas)
    assert len(second) == len(first) + 1 == LONE + 3
    assert 48 < second[-2] <= 64 and 192 < second[-1] <= 256


def test_wrong_lengths_count_where_the_model_does_not_normalise(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, right = Model(bundle, [CPU], "fp32", True), _Replica.texts
    monkeypatch.setattr(_Replica, "texts", lambda *of: right(*of) * np.float32(1.1))
    assert model.measure().minimum >= 0.9999
    manifest = msgspec.structs.replace(bundle.manifest, normalized=False)
    model.bundle = Bundle(bundle.path, manifest)
    assert model.measure().minimum == -1


def test_what_fails_without_padding_is_tried_with_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FlashAttention refuses some widths of a head."""

    def fails(*_: Any) -> None:
        raise RuntimeError("head_size should be a multiple of 8")

    monkeypatch.setattr(Packer, "__call__", fails)
    model, line = torch_engine._try(bundle, [CPU], "fp32")
    assert model and not model.packed
    assert line.startswith("fp32, padded on cpu: smallest cosine 1.0")
    monkeypatch.setattr(_Replica, "texts", fails)
    assert torch_engine._try(bundle, [CPU], "fp32") == (
        None,
        "fp32, padded: head_size should be a multiple of 8",
    )


@pytest.mark.parametrize("code", [True, False])
def test_calls_of_a_model_that_they_may_change_do_not_overlap(bundle: Bundle, code: bool) -> None:
    kind = msgspec.structs.replace(torch_model.torch_of(bundle), code=code)
    manifest = msgspec.structs.replace(bundle.manifest, torch=kind)
    (replica,) = Model(Bundle(bundle.path, manifest), [CPU], "fp32", True)._replicas

    def call(other: threading.Event, mine: threading.Event) -> bool:
        with replica._call():
            mine.set()
            return other.wait(0.3)

    events = threading.Event(), threading.Event()
    with ThreadPoolExecutor() as pool:
        overlap = list(pool.map(call, events, reversed(events)))
    assert all(overlap) is not code


def test_a_wrong_vector_shows_in_what_is_measured(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_on(bundle)
    right = _Replica.texts

    def wrong(replica: _Replica, inputs: Sequence[Any]) -> Float32:
        vectors = right(replica, inputs)
        if len(inputs) == 1:
            vectors[0, 0] = np.nan
        return vectors

    monkeypatch.setattr(_Replica, "texts", wrong)
    assert model.measure().minimum == -1


def test_auto_is_the_cpu_where_there_is_no_gpu_and_threads_are_as_configured(
    bundle: Bundle,
) -> None:
    before = torch.get_num_threads()
    try:
        model = open_model(bundle, device="cpu", precision="auto", threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert (model.where, model.calls, model.max_batch_tokens) == ("cpu", 1, None)
    assert model.precision == ("bf16" if torch_engine._has_amx() else "fp32")


@no_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_named(bundle: Bundle, device: str) -> None:
    with pytest.raises(DeviceUnavailable, match=f"^DEVICE={device}, but .* there is none"):
        open_on(bundle, device)


@pytest.mark.parametrize(
    ("precision", "why"), [("fp16", "it needs a GPU"), ("int8", "was baked without it")]
)
def test_a_precision_that_is_not_there_is_named(bundle: Bundle, precision: str, why: str) -> None:
    with pytest.raises(
        PrecisionUnavailable, match=f"^PRECISION={precision}, .* fp32, bf16: .*{why}"
    ):
        open_on(bundle, precision=precision)


def test_a_bundle_for_cpus_is_not_served_on_a_gpu(models_dir: pathlib.Path, baked: Any) -> None:
    options: dict[str, Any] = {"pad_id": 0, "pad_left": False, "streams": 1}
    with pytest.raises(DeviceUnavailable, match="DEVICE=cuda:0, .*bake it with --engine torch$"):
        text_engine(baked.bundle, "auto", device="cuda:0", **options)
    with pytest.raises(PrecisionUnavailable, match="PRECISION=fp16 is for GPUs"):
        text_engine(baked.bundle, "fp16", **options)
    with pytest.raises(DeviceUnavailable):
        image_engine(baked.bundle, "auto", streams=1, device="cuda")


def test_both_modalities_share_one_model(clip: Bundle) -> None:
    pictures = image_engine(clip, "fp32", streams=1)
    texts: Any = text_engine(clip, "fp32", pad_id=0, pad_left=False, streams=1)
    assert pictures.model is texts.model
    assert open_model(clip, device="cpu", precision="fp32", threads=2) is not texts.model


def test_several_devices_share_the_calls(bundle: Bundle, ids: list[Any]) -> None:
    """As several GPUs do; here both are the CPU."""
    model = Model(bundle, [CPU, CPU], "fp32", True)
    expected = model.texts(ids[:3])
    used = []

    def compute(replica: _Replica, inputs: Sequence[Any]) -> Float32:
        used.append(replica)
        if len(used) == 1:  # while this call runs, another one comes
            model._run(inputs, compute)
        return replica.texts(inputs)

    np.testing.assert_allclose(model._run(ids[:3], compute), expected, atol=1e-6)
    assert {id(replica) for replica in used} == {id(replica) for replica in model._replicas}
    assert [replica.running for replica in model._replicas] == [0, 0]


def small_memory(most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the device's memory suffice for `most` tokens. Returns: the tokens of each call."""
    right, calls = _Replica.texts, list[int]()

    def texts(replica: _Replica, inputs: Sequence[Any]) -> Float32:
        calls.append(sum(map(len, inputs)))
        if calls[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(replica, inputs)

    monkeypatch.setattr(_Replica, "texts", texts)
    return calls


def test_out_of_memory_halves_the_batch_and_those_that_follow(
    bundle: Bundle, ids: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings = list[str]()
    monkeypatch.setattr(torch_model.log, "warning", lambda line, *of: warnings.append(line % of))
    model = Model(bundle, [CPU], "fp32", True)
    expected = model.texts(ids)
    calls = small_memory(500, monkeypatch)
    model.max_batch_tokens = model.min_batch_tokens = 16_384
    np.testing.assert_allclose(model.texts(ids), expected, atol=1e-5)
    failed = sum(tokens > 500 for tokens in calls)
    assert failed > 1 and sum(tokens for tokens in calls if tokens <= 500) == sum(map(len, ids))
    engine = TorchTextEngine(model)
    assert engine.max_batch_tokens == engine.min_batch_tokens == 8192
    assert len(warnings) == failed and "out of memory on cpu" in warnings[0]


def test_out_of_memory_for_one_input_is_its_own_error(
    bundle: Bundle, ids: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(bundle, [CPU], "fp32", True)
    longest = max(ids, key=len)
    calls = small_memory(len(longest) - 1, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        model.texts([longest])
    assert len(calls) == 2
    assert model.texts([ids[0]]).shape == (1, tiny.WIDTH)


def test_one_input_waits_for_the_memory_of_other_calls(
    bundle: Bundle, ids: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cuBLAS cannot allocate is no OutOfMemoryError."""
    model = Model(bundle, [CPU], "fp32", True)
    expected = model.texts(ids[:1])
    right, failed, computing = _Replica.texts, threading.Event(), threading.Event()

    def texts(replica: _Replica, inputs: Sequence[Any]) -> Float32:
        if len(inputs) > 1:
            computing.set()
            assert failed.wait(30)
        elif replica.running > 1:
            failed.set()
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
        return right(replica, inputs)

    monkeypatch.setattr(_Replica, "texts", texts)
    with ThreadPoolExecutor() as pool:
        other = pool.submit(model.texts, ids)
        assert computing.wait(30)
        np.testing.assert_allclose(model.texts(ids[:1]), expected, atol=1e-6)
        assert len(other.result()) == len(ids)


def test_other_errors_pass_through(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Float32:
        raise RuntimeError("no")

    model = Model(bundle, [CPU], "fp32", True)
    monkeypatch.setattr(_Replica, "texts", fails)
    with pytest.raises(RuntimeError, match="^no$"):
        model.texts([np.array([1]), np.array([2])])


def test_a_lost_gpu_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every further call would fail, while the probes stay green."""

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    torch_model.end_if_lost(RuntimeError())
    with pytest.raises(SystemExit) as ended:
        torch_model.end_if_lost(torch.AcceleratorError("illegal memory access"))
    assert ended.value.code == 1
    assert "the GPU failed, and this process ends: illegal memory access" in caplog.text


def test_the_sizes_of_batches_are_those_that_reach_full_and_good_speed(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call takes 1 ms, and 1 ms for each thousand tokens."""
    sizes = []

    def seconds(tokens: int) -> float:
        return (1 + tokens / 1000) / 1000

    def timed(call: Any, texts: Sequence[Any]) -> float:
        sizes.append(sum(map(len, texts)))
        return seconds(sizes[-1])

    model = Model(bundle, [CPU], "fp32", True)
    monkeypatch.setattr(torch_model, "_timed", timed)
    model.size_batches()
    assert sorted(set(sizes)) == list(torch_model.BATCHES)
    speed = {tokens: tokens / seconds(tokens) for tokens in torch_model.BATCHES}
    best = max(speed.values())
    assert model.max_batch_tokens == min(each for each in speed if speed[each] >= 0.95 * best)
    assert model.min_batch_tokens == min(each for each in speed if speed[each] >= 0.8 * best)


@pytest.mark.parametrize("fits", [0, 2])
def test_batches_that_do_not_fit_are_not_taken(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, fits: int
) -> None:
    def timed(call: Any, texts: Sequence[Any]) -> float:
        if sum(map(len, texts)) > 512 << fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 0.01

    model = Model(bundle, [CPU], "fp32", True)
    monkeypatch.setattr(torch_model, "_timed", timed)
    model.size_batches()
    assert model.max_batch_tokens == (512 << fits if fits else 1024)


def copied(bundle: Bundle, folder: pathlib.Path) -> Bundle:
    """A copy whose files may be changed."""
    for name in [*bundle.manifest.files, bundles.MANIFEST]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bundle.file(name).read_bytes())
    return bundles.read(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "modules.json"])
def test_a_model_that_cannot_be_loaded_is_a_damaged_bundle(
    bundle: Bundle, tmp_path: pathlib.Path, name: str
) -> None:
    damaged = copied(bundle, tmp_path / "bert")
    damaged.file(f"{bundles.TORCH_MODEL}/{name}").write_bytes(b"{")
    with pytest.raises(BundleError, match="its model cannot be loaded"):
        open_on(damaged)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04", b"{}"])
def test_a_sample_that_cannot_be_read_is_a_damaged_bundle(
    bundle: Bundle, tmp_path: pathlib.Path, content: bytes | None
) -> None:
    damaged = copied(bundle, tmp_path / "bert")
    sample = damaged.file(bundles.SAMPLE)
    sample.unlink() if content is None else sample.write_bytes(content)
    with pytest.raises(BundleError, match=f"{bundles.SAMPLE} cannot be read"):
        open_on(damaged).measure()


@pytest.mark.usefixtures("torch_child")
def test_a_service_with_torch_gives_the_models_vectors_alone_and_in_company(
    folder: pathlib.Path, models_dir: pathlib.Path, clip: Bundle
) -> None:
    from sentence_transformers import SentenceTransformer

    from image_embeddings import probe_picture

    assert clip.path.parent == models_dir
    with serve(models_dir, PRECISION="fp32", DEVICE="cpu") as server:
        info = server.client.get("/info").json()
        assert (info["engine"], info["instruction_set"]) == ("torch", "cpu")
        for name in ("bert", "mpnet"):
            expected = SentenceTransformer(str(folder / name), device="cpu").encode(tiny.TEXTS)
            alone = [server.embed(text, model=name) for text in tiny.TEXTS]
            response = server.post("/embeddings/batch", {"texts": tiny.TEXTS, "model": name})
            together = [vectors[0] for vectors in response.json()["embeddings"]]
            for vectors in (alone, together):
                assert cosines(np.array(vectors, np.float32), expected).min() >= 0.9999
        long = "What is deep learning? " * 100  # several chunks
        assert math.isclose(np.linalg.norm(server.embed(long, model="bert")), 1, abs_tol=1e-4)
        picture = {"image": base64.b64encode(probe_picture()).decode(), "model": clip.path.name}
        response = server.post("/embeddings/image", picture)
        vector = np.array(response.json()["embeddings"], np.float32)
        assert cosines(vector, np.array([clip.manifest.image_probe], np.float32)).min() >= 0.9999
        log = server.log_path.read_text()
        assert "fp32 by torch (cpu)" in log and "Traceback" not in log


def test_changed_code_is_a_damaged_bundle(bundle: Bundle, tmp_path: pathlib.Path) -> None:
    """All below the model's folder is in the manifest, by its sha256."""
    damaged = copied(bundle, tmp_path / "bert")
    name = f"{bundles.TORCH_MODEL}/config.json"
    damaged.file(name).write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(BundleError, match=f"{name} is damaged"):
        damaged.verify()


def test_code_is_run_only_if_the_bundle_says_so(bundle: Bundle, tmp_path: pathlib.Path) -> None:
    """modules.json may name any module; with an unknown one, code of the model would be run."""
    changed = copied(bundle, tmp_path / "bert")
    modules = changed.file(f"{bundles.TORCH_MODEL}/modules.json")
    entries = json.loads(modules.read_text())
    entries[1]["type"] = "mine.Pooling"
    modules.write_text(json.dumps(entries))
    ran = tmp_path / "ran"
    changed.file(f"{bundles.TORCH_MODEL}/mine.py").write_text(
        f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n"
        "from sentence_transformers.sentence_transformer.modules import Pooling as Pooling\n"
    )
    with pytest.raises(BundleError, match="cannot be loaded"):
        open_on(changed)
    assert not ran.exists()
    trusted = msgspec.structs.replace(
        changed.manifest, torch=bundles.Torch(code=True, packed=False), created="another"
    )
    open_on(Bundle(changed.path, trusted))
    assert ran.exists()


def test_no_batch_takes_long(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(bundle, [CPU], "fp32", True)
    seconds = iter([0.1, 0.1, 0.1, 0.19, 0.19, 0.19, 0.3, 0.3, 0.3])
    monkeypatch.setattr(torch_model, "_timed", lambda *_: next(seconds))
    model.size_batches()
    assert next(seconds, None) is None and model.max_batch_tokens == 4096
