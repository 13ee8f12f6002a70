"""bake/untraced.py: bundles for the torch engine, and when a bake makes one."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tiny_clip
import tiny_code
import tiny_models as tiny
import torch
from baking import FAR, PROMPTS, bake, cosines, embed, refusal
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Module
from servers import ROOT

import bake_model
from bake import stages
from bake.samples import sample_pictures
from embeddings import TextEmbedder
from engine.bundle import PARITY_FLOOR, Bundle, read
from engine.openvino_backend import OpenVINOTextEngine, available_precisions
from engine.packing import can_pack
from engine.queue import Queue
from engine.torch_engine import TorchImageEngine, TorchTextEngine, open_model
from engine.torch_model import Model
from image_embeddings import ImageEmbedder
from limits import ImageLimits, TextLimits
from tokens import load_tokenizer

TORCH = ("--engine", "torch")
TRUST = "--trust-remote-code"


def check(bundle: Bundle, expected: Any) -> None:
    """Compare what is served with `expected`, the model's own vectors of tiny.TEXTS: texts in
    company, alone, and in one call of the engine.
    """
    model = open_model(bundle, device="cpu", precision="fp32", threads=1)
    assert model.packed == (bundle.manifest.torch is not None and bundle.manifest.torch.packed)
    tokenizer, _, _ = load_tokenizer(bundle)
    queue = Queue(max_batch_size=64, max_batch_tokens=4096, max_queue_tokens=1 << 30, threads=1)
    queue.start()
    try:
        engine = TorchTextEngine(model)
        embedder = TextEmbedder(bundle, tokenizer, engine, queue, TextLimits())
        company = embed(embedder, tiny.TEXTS)
        alone = np.concatenate([embed(embedder, [text]) for text in tiny.TEXTS])
        call = engine.run([chunk.token_ids for (chunk,) in embedder.chunk(tiny.TEXTS)])
    finally:
        queue.close()
    for vectors in (company, alone, call):
        assert cosines(vectors, expected).min() >= 0.9999
    lengths = np.linalg.norm(expected, axis=1)
    assert np.linalg.norm(company, axis=1) == pytest.approx(lengths, rel=0.005)
    apart = cosines(expected[:, None], expected[None])[~np.eye(len(expected), dtype=bool)]
    assert apart.max() < 0.998, "the texts' vectors are too alike to tell right from wrong"


def own_vectors(folder: pathlib.Path, texts: Sequence[str] = tiny.TEXTS) -> Any:
    model = SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)
    return model.encode(list(texts))


@pytest.mark.parametrize(
    ("make", "pooling", "packed"),
    [
        (tiny.bert, "mean", True),
        (tiny.roberta, "cls", True),
        (tiny.modernbert, "mean", True),
        (tiny.qwen3, "lasttoken", True),
        (tiny.gemma3, "lasttoken", True),
        (tiny.mpnet, "mean", False),
        (tiny.t5, "mean", False),
    ],
)
def test_a_bundle_gives_the_models_own_vectors(
    make: Callable[[], tiny.Made], pooling: str, packed: bool, tmp_path: pathlib.Path
) -> None:
    folder = tiny.save(tmp_path / "model", make, pooling, normalize=make is not tiny.gemma3)
    bundle = bake(folder, tmp_path / "models", *TORCH, "--max-tokens", str(tiny.WINDOW))
    manifest = bundle.manifest
    assert manifest.torch and manifest.torch.packed == packed and not manifest.torch.code
    assert manifest.precisions == ["fp32"] and manifest.parity["torch"]["fp32"].minimum >= 0.9999
    check(bundle, own_vectors(folder))


def test_the_files_are_the_models_and_no_more(tmp_path: pathlib.Path) -> None:
    folder = tiny.save(tmp_path / "model", prompts=PROMPTS, default_prompt="query")
    for name in ("README.md", "optimizer.pt", "trainer_state.json"):
        (folder / name).write_text("{}")
    bundle = bake(folder, tmp_path / "models", *TORCH, "--max-tokens", "48")
    inside = [path for path in bundle.path.rglob("*") if path.is_file()]
    names = {path.relative_to(bundle.path).as_posix() for path in inside}
    assert names == {*bundle.manifest.files, "manifest.json"}
    assert {name for name in names if not name.startswith("torch/")} == {
        "tokenizer.json",
        "sample.npz",
        "manifest.json",
    }
    assert "torch/model.safetensors" in names and "torch/1_Pooling/config.json" in names
    assert not {"torch/README.md", "torch/optimizer.pt", "torch/trainer_state.json"} & names

    with np.load(bundle.file("sample.npz"), allow_pickle=False) as sample:
        ids, lengths, vectors = (sample[name] for name in ("ids", "lengths", "vectors"))
        assert set(sample) == {"ids", "lengths", "vectors"}
    assert ids.dtype == lengths.dtype == np.int64 and vectors.dtype == np.float32
    assert ids.shape == (lengths.sum(),) and lengths.min() < 10 and lengths.max() == 48
    assert vectors.shape == (stages.TEXTS, tiny.WIDTH) and len(lengths) == stages.TEXTS
    model = SentenceTransformer(str(folder), device="cpu")
    texts = np.split(ids, np.cumsum(lengths)[:-1])
    probe = model.preprocess(["query: " + bundle.manifest.probe.text])["input_ids"]
    assert texts[0].tolist() == probe[0].tolist()
    assert vectors[0] == pytest.approx(model.encode(bundle.manifest.probe.text), abs=1e-5)


def test_a_checkpoint_keeps_its_dtype(tmp_path: pathlib.Path) -> None:
    folder = tiny.save(tmp_path / "model")
    SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.bfloat16}).save(
        str(folder), create_model_card=False
    )
    bundle = bake(folder, tmp_path / "models", *TORCH)
    weights = bundle.file("torch") / "model.safetensors"
    assert weights.stat().st_size == (folder / "model.safetensors").stat().st_size
    assert json.loads((bundle.file("torch") / "config.json").read_text())["dtype"] == "bfloat16"
    exact = SentenceTransformer(
        str(folder), device="cpu", model_kwargs={"dtype": torch.float32}
    ).encode(tiny.TEXTS)
    check(bundle, exact)


def test_texts_and_pictures_of_a_clip(tmp_path: pathlib.Path) -> None:
    folder = tiny_clip.save(tmp_path / "clip", trained=False)
    bundle = bake(folder, tmp_path / "models", *TORCH)
    assert bundle.manifest.modalities == ["text", "image"]
    assert bundle.manifest.image_parity["torch"]["fp32"].minimum >= 0.9999
    model = open_model(bundle, device="cpu", precision="fp32", threads=1)
    own = SentenceTransformer(str(folder), device="cpu")
    tokenizer, _, _ = load_tokenizer(bundle)
    pictures = sample_pictures()[:4]
    queue = Queue(max_batch_size=64, max_batch_tokens=4096, max_queue_tokens=1 << 30, threads=1)
    queue.start()
    try:
        texts = ["a red square", "a picture of a blue circle on a plain ground", "green"]
        embedder = TextEmbedder(bundle, tokenizer, TorchTextEngine(model), queue, TextLimits())
        assert cosines(embed(embedder, texts), own.encode(texts)).min() >= 0.9999
        engine = TorchImageEngine(model)
        images = ImageEmbedder(bundle, engine.preprocessing, engine, queue, ImageLimits())
        served = images.embed(pictures, deadline=time.monotonic() + FAR)
    finally:
        queue.close()
    paths = [tmp_path / f"{number}" for number in range(len(pictures))]
    for path, data in zip(paths, pictures):
        path.write_bytes(data)
    expected = own.encode([Image.open(path).convert("RGB") for path in paths])
    assert cosines(np.stack([each.vector for each in served]), expected).min() >= 0.9999


def other_repository(folder: pathlib.Path) -> pathlib.Path:
    return tiny_code.own_model(folder, code=folder.parent / "code")


@pytest.mark.usefixtures("torch_child")
def test_code_of_a_model_goes_into_the_bundle(tmp_path: pathlib.Path) -> None:
    """Whatever it was baked from is gone; another process loads it from the bundle alone."""
    makers = [tiny_code.own_model, other_repository, tiny_code.own_module, tiny_code.old_module]
    plain = own_vectors(tiny.save(tmp_path / "plain", pooling="cls"))
    (tmp_path / "sources").mkdir()
    for make in makers:
        folder = make(tmp_path / "sources" / make.__name__)
        line = refusal(folder, tmp_path / "models", *TORCH)
        assert "it brings Python code of its own, which only --trust-remote-code runs" in line
        expected = own_vectors(folder)
        assert cosines(expected, plain).max() < 0.9
        bundle = bake(folder, tmp_path / "models", *TORCH, TRUST)
        assert bundle.manifest.torch and bundle.manifest.torch.code
        check(bundle, expected)
        for file in bundle.file("torch").rglob("*.json"):
            assert "--" not in file.read_text() and "not_there_own" not in file.read_text()
    shutil.rmtree(tmp_path / "sources")
    shutil.move(tmp_path / "models", tmp_path / "moved")
    program = (
        "import pathlib, sys\n"
        "from engine import bundle, torch_engine\n"
        "for name in sys.argv[1:]:\n"
        "    made = bundle.read(pathlib.Path(name))\n"
        "    options = dict(device='cpu', precision='fp32', threads=1)\n"
        "    print(torch_engine.open_model(made, **options).measure().minimum)\n"
    )
    paths = [str(tmp_path / "moved" / make.__name__) for make in makers]
    fresh = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "fresh")}
    output = subprocess.check_output(
        [sys.executable, "-c", program, *paths], cwd=ROOT, env={**os.environ, **fresh}
    )
    minima = [float(line) for line in output.split()]
    assert len(minima) == len(makers) and min(minima) >= 0.9999


def test_what_is_wrong_without_padding_is_served_with_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Model]] = []

    def load(*arguments: Any) -> Model:
        """One model is in memory at a time: a large one takes gigabytes."""
        assert not any(model() for model in loaded)
        model = Model(*arguments)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr("bake.untraced.Model", load)
    folder = tiny_code.own_model(tmp_path / "model")
    assert can_pack(SentenceTransformer(str(folder), device="cpu", trust_remote_code=True))
    bundle = bake(folder, tmp_path / "models", *TORCH, TRUST)
    assert bundle.manifest.torch and not bundle.manifest.torch.packed and len(loaded) == 2
    check(bundle, own_vectors(folder))


@pytest.mark.parametrize(
    ("make", "module", "why"),
    [
        (tiny.bert, tiny_code.Untraceable, "how many steps I take depends"),
        (tiny.bert, tiny_code.Unconvertible, "bessel_j0"),
        (tiny.bert, tiny_code.Counting, ": OpenVINO cannot run its graph"),
    ],
)
def test_what_cannot_be_traced_is_baked_for_torch(
    make: Callable[[], tiny.Made],
    module: type[Module],
    why: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tiny.save(tmp_path / "model", make, heads=[module()], normalize=False)
    window = ["--max-tokens", str(tiny.WINDOW)]
    capsys.readouterr()
    bundle = bake(folder, tmp_path / "models", TRUST, *window)
    assert bundle.manifest.torch and bundle.manifest.torch.code
    names = {path.name for path in bundle.path.iterdir()}
    assert names == {"torch", "sample.npz", "tokenizer.json", "manifest.json"}
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert why in text
        assert (
            "baked for torch instead, which serving needs then: the image gets about 1 GB" in text
        )
        assert "it needs the package tiny_code, which is not part of it" in text
    check(bundle, own_vectors(folder))
    line = refusal(folder, tmp_path / "other", TRUST, "--precisions", "int8", *window)
    assert line.endswith("(torch could run it, but not at int8)")


def test_where_only_pictures_cannot_be_traced_no_graph_is_left(tmp_path: pathlib.Path) -> None:
    clip = tiny_clip.save(tmp_path / "clip", trained=False)
    whole = SentenceTransformer(modules=[*SentenceTransformer(str(clip)), tiny_code.Sightless()])
    whole.save(str(tmp_path / "model"), create_model_card=False)
    bundle = bake(tmp_path / "model", tmp_path / "models", TRUST)
    names = {path.name for path in bundle.path.iterdir()}
    assert names == {"torch", "sample.npz", "tokenizer.json", "preprocess.json", "manifest.json"}
    assert {name.partition("/")[0] for name in bundle.manifest.files} == names - {"manifest.json"}
    assert bundle.manifest.torch and bundle.manifest.image_parity["torch"]["fp32"].minimum >= 0.9999


@pytest.mark.parametrize("make", [tiny.bert, tiny.roberta, tiny.distilbert])
def test_what_openvino_gets_wrong_is_baked_for_torch(
    make: Callable[[], tiny.Made], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.save(tmp_path / "model", make, heads=[tiny_code.Mistraced()], normalize=False)
    wrong = "at fp32 its vectors are not the model's own: smallest cosine"
    line = refusal(folder, tmp_path / "models", TRUST, "--engine", "openvino")
    assert wrong in line
    capsys.readouterr()
    bundle = bake(folder, tmp_path / "models", TRUST, "--max-tokens", str(tiny.WINDOW))
    assert bundle.manifest.torch and not bundle.file("text.xml").exists()
    said = capsys.readouterr().out
    assert wrong in said and "baked for torch instead" in said
    check(bundle, own_vectors(folder))


def test_a_trace_with_wrong_lengths_is_wrong(tmp_path: pathlib.Path) -> None:
    folder = tiny.save(tmp_path / "model", heads=[tiny_code.Scaling()], normalize=False)
    line = refusal(folder, tmp_path / "models", TRUST, "--engine", "openvino")
    assert "at fp32 its vectors are not the model's own: their lengths are off" in line
    bundle = bake(folder, tmp_path / "models", TRUST)
    assert bundle.manifest.torch
    check(bundle, own_vectors(folder))


def test_torch_has_no_int8(tmp_path: pathlib.Path, bare: pathlib.Path) -> None:
    assert refusal(bare, tmp_path / "models", *TORCH, "--precisions", "fp32,int8") == (
        f"cannot bake {bare}: --engine torch has no int8; leave it out of --precisions"
    )


def test_bf16_below_its_floor_is_left_out(
    tmp_path: pathlib.Path,
    bare: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(PARITY_FLOOR, "bf16", 1.1)
    bake_model.main([str(bare), *TORCH, "--output", str(tmp_path)])
    manifest = read(tmp_path / bare.name).manifest
    assert manifest.precisions == ["fp32"] and list(manifest.parity["torch"]) == ["fp32"]
    assert "at least 1.1 needed" in manifest.left_out["torch"]["bf16"]
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert "at bf16 its vectors are not the model's own" in text
        assert "at least 1.1 needed: left out" in text
    line = refusal(bare, tmp_path / "models", *TORCH, "--precisions", "bf16")
    assert line.endswith("at least 1.1 needed (--precisions fp32 bakes it without)")


def test_a_precision_at_which_its_code_fails_is_left_out(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is no Fourier transform of bf16."""
    folder = tiny.save(tmp_path / "model", tiny.fnet)
    options = ["--output", str(tmp_path / "models"), "--max-tokens", str(tiny.WINDOW)]
    bake_model.main([str(folder), *options])
    manifest = read(tmp_path / "models" / "model").manifest
    assert manifest.precisions == ["fp32"]
    assert (
        manifest.left_out["torch"]["bf16"] == "at bf16 its code fails: Unsupported dtype BFloat16"
    )
    said = capsys.readouterr()
    assert "note: at bf16 its code fails: " in said.out and "Traceback" not in said.err
    line = refusal(folder, tmp_path / "other", *options[2:], *TORCH, "--precisions", "bf16")
    assert line.endswith("Unsupported dtype BFloat16 (--precisions fp32 bakes it without)")


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_precision_at_which_openvino_fails_is_left_out(
    precision: str,
    bare: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if precision not in available_precisions():
        pytest.skip(f"this CPU has no {precision}")
    right = OpenVINOTextEngine.run

    def run(engine: OpenVINOTextEngine, inputs: Any, **how: Any) -> Any:
        if engine.precision == precision:
            raise RuntimeError("no such operation")
        return right(engine, inputs, **how)

    monkeypatch.setattr(OpenVINOTextEngine, "run", run)
    bake_model.main([str(bare), "--output", str(tmp_path)])
    bundle = read(tmp_path / bare.name)
    bundle.verify()
    assert not bundle.manifest.torch and "fp32" in bundle.manifest.precisions
    assert precision not in bundle.manifest.precisions
    why = bundle.manifest.left_out["OpenVINO"][precision]
    assert why == "no such operation: OpenVINO cannot run its graph"


def test_the_summary_of_a_torch_bundle(
    tmp_path: pathlib.Path, bare: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = bake(bare, tmp_path, *TORCH, "--precisions", "fp32,bf16")
    rows = [line.split("  ", 1) for line in capsys.readouterr().out.splitlines()]
    said = {label: text.strip() for label, text in rows}
    files, parity = bundle.manifest.files, bundle.manifest.parity["torch"]
    size = sum(file.size for name, file in files.items() if name.startswith("torch/"))
    assert said["torch"] == f"{size / 1e6:.1f} MB" and said["engine"] == "torch, unpadded"
    for precision in ("fp32", "bf16"):
        assert said[f"{precision}, torch"].startswith(
            f"cosine at least {parity[precision].minimum:.6f} (alone "
        )
    assert said["int8"] == "not baked"


@pytest.mark.usefixtures("torch_child")
def test_torch_bakes_without_openvino(tmp_path: pathlib.Path, bare: pathlib.Path) -> None:
    program = (
        "import importlib.metadata, sys\n"
        "sys.modules.update(dict.fromkeys(['openvino', 'nncf']))  # importing them fails\n"
        "version = importlib.metadata.version\n"
        "def installed(name):\n"
        "    if name in ('openvino', 'nncf'):\n"
        "        raise importlib.metadata.PackageNotFoundError(name)\n"
        "    return version(name)\n"
        "importlib.metadata.version = installed\n"
        "import bake_model\n"
        "import benchmark_embeddings\n"
        "bake_model.main([*sys.argv[1:], '--engine', 'torch'])\n"
        "bake_model.main(sys.argv[1:])\n"
    )
    options = [str(bare), "--output", str(tmp_path), "--precisions", "fp32"]
    ended = subprocess.run(
        [sys.executable, "-c", program, *options], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(f"cannot bake {bare}: ")
    assert last.endswith(": OpenVINO and nncf cannot be used; --engine torch bakes without")
    bundle = read(tmp_path / bare.name)
    bundle.verify()
    assert bundle.manifest.torch
    assert set(bundle.manifest.versions) == {
        "sentence-transformers",
        "transformers",
        "torch",
        "tokenizers",
    }


def test_a_tokenizer_with_ids_beyond_the_embeddings_is_refused(tmp_path: pathlib.Path) -> None:
    """No text of the sample has the token; one client's text would fail everybody's batch."""

    def grown() -> tiny.Made:
        tokenizer, model = tiny.bert()
        tokenizer.add_tokens(["zzzunusedzzz"])
        return tokenizer, model

    line = refusal(tiny.save(tmp_path / "model", grown), tmp_path / "models", *TORCH)
    assert "its tokenizer has ids up to" in line and "resize_token_embeddings" in line
