"""A bake that fails, is stopped or is killed, at whatever stage, leaves nothing behind."""

import concurrent.futures
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from baking import FAR, Baked, content
from servers import ROOT

import bake_model
from engine import bundle as bundles

STAGES = [
    "bake.source.load",
    "bake.source.tokenizer",
    "bake.source.check_tokenizer",
    "bake.source.default_dimensions",
    "bake.stages.sample_texts",
    "bake.stages.reference",
    "bake.traced.trace_texts",
    "bake.traced.write_sample",
    "bake.traced.encoder.describe",
    "bake.traced.measure",
    "bake.traced.enter",
    "engine.bundle.fingerprint",
]
TORCH_STAGES = [
    "bake.source.as_published",
    "bake.untraced.gather_code",
    "bake.untraced.write_sample",
    "bake.untraced.Model",
    "bake.untraced.measure",
]


@pytest.mark.parametrize("stage", [*STAGES, *TORCH_STAGES])
def test_an_exception_at_any_stage_leaves_nothing(
    stage: str, bare: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(stage, fail)
    engine = ["--engine", "torch" if stage in TORCH_STAGES else "openvino"]
    options = [str(bare), "--output", str(tmp_path / "models"), "--precisions", "fp32", *engine]
    with pytest.raises((MemoryError, SystemExit)):
        bake_model.main(options)
    assert not list(tmp_path.iterdir())


def test_what_a_kill_between_the_renames_left_is_mended(
    baked: Baked, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(baked.bundle.path, tmp_path / f".x.{bundles.REPLACED}")
    shutil.copytree(baked.bundle.path, tmp_path / ".x.draft")
    bundles.clear(tmp_path, "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert content(tmp_path / "x") == content(baked.bundle.path)


def settled(folder: pathlib.Path, wanted: dict[str, bytes]) -> bool:
    """Whether a folder's content becomes `wanted`, soon."""
    for _ in range(100):
        if content(folder) == wanted:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("kept", [False, True])
def test_a_kill_between_the_renames_leaves_the_earlier_bundle(
    kept: bool, tmp_path: pathlib.Path
) -> None:
    """A process that ends itself where `write` renames, with an earlier bundle and without."""
    program = (
        "import os, pathlib, signal, sys\n"
        "from engine import bundle\n"
        "def rename(old, new, rename=os.rename):\n"
        "    if '.x.' in str(old):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    rename(old, new)\n"
        "os.rename = rename\n"
        "class Empty(bundle.msgspec.Struct):\n"
        "    pass\n"
        "bundle.write(pathlib.Path(sys.argv[1]), 'x', lambda folder: Empty())\n"
    )
    if kept:
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "text.bin").write_bytes(b"old")
    before = content(tmp_path)
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT)
    assert ended.returncode == -signal.SIGKILL
    assert settled(tmp_path, before)


KILLS = {
    "term": ("tracing to OpenVINO", signal.SIGTERM),
    "int": ("checking vectors at fp32", signal.SIGINT),
    "kill": ("tracing to OpenVINO", signal.SIGKILL),
    "kill-later": ("compressing weights to int8", signal.SIGKILL),
    "kill-last": ("checking vectors at fp32", signal.SIGKILL),
}


@pytest.mark.usefixtures("torch_child")
def test_a_stopped_bake_leaves_nothing_half_made(
    bare: pathlib.Path, baked: Baked, tmp_path: pathlib.Path
) -> None:
    """Real processes: some with an earlier bundle of the name, some without."""
    for name in ("int", "kill", "kill-last"):
        shutil.copytree(baked.bundle.path, tmp_path / name)
    before = content(tmp_path)

    def stop(name: str) -> None:
        stage, number = KILLS[name]
        command = [sys.executable, "bake_model.py", str(bare), "--name", name]
        command += ["--output", str(tmp_path), "--precisions", "fp32,int8"]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, bufsize=0) as process:
            assert process.stderr is not None
            said = b""
            while not said.endswith(f"{stage} …".encode()):
                said += (byte := process.stderr.read(1))
                assert byte, said.decode()
            assert list(tmp_path.glob(f".{name}.*/tokenizer.json"))
            process.send_signal(number)
            _, rest = process.communicate(timeout=FAR)
        if number == signal.SIGKILL:
            assert process.returncode == -number
        else:
            assert process.returncode == 1
            assert rest.decode() == "\nbake stopped; nothing was written\n"

    # Each its own thread: whom nobody reads comes to its end meanwhile.
    with concurrent.futures.ThreadPoolExecutor(len(KILLS)) as pool:
        list(pool.map(stop, KILLS))
    assert settled(tmp_path, before)
