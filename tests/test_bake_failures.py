"""A bake that fails, is stopped or is killed, at whatever stage, leaves nothing behind."""

import concurrent.futures
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from baking import FAR, Baked, content
from servers import ROOT
from test_bake_kinds_served import static

import bake_model
from engine import bundle as bundles
from engine.openvino_backend import available_precisions

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
    """Whether a folder's content becomes `wanted`."""
    deadline = time.monotonic() + FAR
    while content(folder) != wanted:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


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
    "kill-last": ("checking vectors at fp32", signal.SIGKILL),
}


# What ends where the process kills itself: a function, at which of its calls; or a stage.
ENDS = [
    ("bake.source.load", 1),
    ("bake.stages.sample_texts", 1),
    ("bake.stages.reference", 1),
    ("tracing to OpenVINO", 1),
    ("bake.export.ov.save_model", 1),
    ("compressing weights to int8", 1),
    ("bake.export.ov.save_model", 2),
    ("bake.traced.write_sample", 1),
    ("bake.traced.encoder.describe", 1),
    *((f"checking vectors at {precision}", 1) for precision in available_precisions()),
    ("engine.bundle.fingerprint", 3),
    ("engine.bundle.msgspec.json.format", 1),
    ("pathlib.Path.write_bytes", 1),
    ("os.rename", 1),
    ("os.rename", 2),
]
TORCH_ENDS = [
    ("saving the model", 1),
    ("bake.untraced.gather_code", 1),
    ("checking vectors at fp32", 1),
]
KILLING = """
import contextlib, importlib, json, os, pathlib, signal, sys

import bake_model
from bake import export, stage, traced, untraced
from engine import bundle as bundles
from engine.errors import BundleError

models, ends, options = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
# Whoever would clear up is killed too, as when a container is.
bundles._watched = lambda *paths: contextlib.nullcontext()


def dying(call, at):
    calls = 0

    def counted(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **named)

    return counted


def stop_at(name, at):
    if " " in name:
        end = dying(stage, at)
        for module in (export, traced, untraced):
            module.stage = lambda what: (end if what == name else stage)(what)
        return
    parts, rest = name.split("."), []
    while True:
        with contextlib.suppress(ImportError):
            found = importlib.import_module(".".join(parts))
            break
        rest.insert(0, parts.pop())
    for part in rest[:-1]:
        found = getattr(found, part)
    setattr(found, rest[-1], dying(getattr(found, rest[-1]), at))


def bake(*end):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        if end:
            stop_at(*end)
        bake_model.main(["--output", str(models), "--name", "x", *options])
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        (bundle,) = bundles.discover(models)
        bundle.verify()
        served = bundle.manifest.created
    except BundleError:
        served = None
    print(json.dumps([code, served, sorted(path.name for path in models.iterdir())]))


bake()
for end in ends:
    bake(*end)
bake()
"""


@pytest.mark.usefixtures("torch_child")
@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_a_kill_at_any_stage_serves_no_half_made_bundle(
    engine: str, tmp_path: pathlib.Path
) -> None:
    """The earlier bundle is served, and the next bake of the name leaves no trace of those that
    were killed.
    """
    folder = static(tmp_path / "model")
    ends = ENDS if engine == "openvino" else TORCH_ENDS
    command = [sys.executable, "-c", KILLING, str(tmp_path / "models"), json.dumps(ends)]
    command += [str(folder), "--max-tokens", "64", "--engine", engine]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *killed, last = [
        json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")
    ]
    assert [first[0], last[0]] == [0, 0] and first[1] and last[1] and first[1] != last[1]
    assert first[2] == last[2] == ["x"]
    assert len(killed) == len(ends)
    left = 0
    for (code, served, names), end in zip(killed, ends):
        assert code == -signal.SIGKILL, end
        between = end == ("os.rename", 2)  # the next bake moves it back
        assert served == (None if between else first[1]), end
        assert all(name.startswith(".x.") for name in names if name != "x"), end
        left += len(names) > 1
    assert left > len(ends) / 2


@pytest.mark.usefixtures("torch_child")
def test_a_stopped_bake_leaves_nothing_half_made(
    bare: pathlib.Path, baked: Baked, tmp_path: pathlib.Path
) -> None:
    """Real processes: some with an earlier bundle of the name, some without."""
    for name in ("int", "kill-last"):
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
