"""`bake_model.py --check BUNDLE`: what holds of a bundle on this machine."""

import pathlib
import shutil

import numpy as np
import pytest
import tiny_clip
from baking import Baked, bake

import bake_model
from engine.bundle import SAMPLE, Bundle, fingerprint, read
from engine.openvino_backend import OpenVINOTextEngine, available_precisions


def check(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The rows that it prints, by their labels."""
    capsys.readouterr()
    bake_model.main(["--check", str(bundle.path)])
    return rows(capsys)


def rows(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    pairs = (line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    return {label: said.strip() for label, said in pairs}


def test_every_engine_and_precision_is_measured_here(
    bare: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = bake(bare, tmp_path, "--precisions", "fp32,bf16")
    found = check(bundle, capsys)
    assert list(found) == ["fp32, OpenVINO", "bf16, OpenVINO"]
    assert found["fp32, OpenVINO"].startswith("holds: cosine at least 1.0000")
    here = "bf16" in available_precisions()
    assert found["bf16, OpenVINO"].startswith("holds: " if here else "this CPU cannot run it")
    before = bundle.file("manifest.json").read_bytes()
    assert read(bundle.path).file("manifest.json").read_bytes() == before


@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_pictures_and_torch_too(
    engine: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = tiny_clip.save(tmp_path / "clip", trained=False)
    options = ["--engine", engine, "--precisions", "fp32"]
    bundle = bake(clip, tmp_path / "models", *options)
    for said in check(bundle, capsys).values():
        assert said.startswith("holds: cosine") and "vectors of pictures" in said


def test_what_does_not_hold_ends_with_1(
    baked: Baked, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(baked.bundle.path, tmp_path / "x")
    bundle = read(tmp_path / "x")
    with np.load(bundle.file(SAMPLE)) as saved:
        arrays = dict(saved)
    arrays["vectors"][5] *= -1
    np.savez(bundle.file(SAMPLE), **arrays)
    with pytest.raises(SystemExit, match=r"^cannot check .*sample.npz is damaged .*bake it again$"):
        bake_model.main(["--check", str(bundle.path)])
    manifest = bundle.file("manifest.json")
    old, new = baked.bundle.manifest.files[SAMPLE].sha256, fingerprint(bundle.file(SAMPLE)).sha256
    manifest.write_text(manifest.read_text().replace(old, new))
    capsys.readouterr()
    with pytest.raises(SystemExit, match="not every precision holds on this machine; serve one"):
        bake_model.main(["--check", str(bundle.path)])
    (said,) = rows(capsys).values()
    assert said.startswith("does not hold: at fp32 its vectors are not the model's own: ")
    assert "smallest cosine -1.00000 (OpenVINO, " in said


def test_an_engine_that_fails_does_not_hold(
    baked: Baked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such operation")

    monkeypatch.setattr(OpenVINOTextEngine, "run", fail)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="not every precision holds on this machine; serve one"):
        bake_model.main(["--check", str(baked.bundle.path)])
    assert rows(capsys) == {
        "fp32, OpenVINO": "does not hold: no such operation: OpenVINO cannot run its graph"
    }


def test_what_the_bake_left_out_is_named(
    baked: Baked, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(baked.bundle.path, tmp_path / "x")
    bundle = read(tmp_path / "x")
    text = bundle.file("manifest.json").read_text()
    wrong = '"left_out": {"OpenVINO": {"int8": "its vectors are wrong"}}'
    bundle.file("manifest.json").write_text(text.replace('"left_out": {}', wrong))
    found = check(bundle, capsys)
    assert found["int8, OpenVINO"] == "left out by the bake: its vectors are wrong"


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_no_bundle(name: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=f"^cannot check .*{name}: bundle .*no readable manifest"):
        bake_model.main(["--check", str(tmp_path / name)])
