"""bake_model.py: what it says, what names it takes; a second bake replaces the first."""

import contextlib
import io
import itertools
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import pytest
import tiny_models as tiny
from baking import FAR, OWN, Baked, bake, refusal
from servers import ROOT

from bake import stage
from bake.parity import thread_counts
from engine import bundle as bundles
from engine.bundle import PARITY_FLOOR


def test_the_summary_names_what_was_made(baked: Baked) -> None:
    rows = [line.split("  ", 1) for line in baked.stdout.splitlines()]
    files = baked.bundle.manifest.files
    assert list(files) == ["tokenizer.json", "text.xml", "text.bin", "sample.npz"]
    parity = baked.bundle.manifest.parity["OpenVINO"]["fp32"]
    threads = ", ".join(map(str, thread_counts()))
    assert {label: text.strip() for label, text in rows} == {
        "bundle": str(baked.bundle.path),
        "source": "org/bert",
        "task": "embed",
        "dimensions": f"{tiny.WIDTH}, normalised",
        "window": "48 tokens",
        "prompts": "query='query: ', passage='passage: '",
        **{name: f"{file.size / 1e6:.1f} MB" for name, file in files.items()},
        "fp32, OpenVINO": f"cosine at least {parity.minimum:.6f} (alone {parity.alone:.6f}), "
        f"mean {parity.mean:.6f} over {parity.cases} vectors, {parity.nearest:.1%} of the nearest "
        f"ten the same; threads: {threads}",
        "bf16": "not baked",
        "int8": "not baked",
    }


def test_progress_goes_to_stderr_a_stage_a_line(bert: pathlib.Path, baked: Baked) -> None:
    done = [line.split(" … ") for line in baked.stderr.splitlines()]
    assert [what for what, _ in done] == [
        f"loading {bert}",
        "embedding the sample with sentence-transformers",
        "tracing to OpenVINO",
        "checking vectors at fp32",
    ]
    assert all(re.fullmatch(r"\d+\.\d s", took) for _, took in done)


class Screen(io.StringIO):
    """stderr on a terminal, or not. Tells when something was written after a stage's name."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal, self.told = terminal, threading.Event()

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        if text and self.getvalue():
            self.told.set()
        return super().write(text)


def test_a_long_stage_says_on_a_terminal_that_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bake.ALIVE_EVERY", 0.01)
    threads = threading.active_count()
    for terminal, then in itertools.product([True, False], [None, ValueError]):
        screen = Screen(terminal)
        monkeypatch.setattr(sys, "stderr", screen)
        with contextlib.suppress(ValueError), stage("tracing"):
            assert screen.told.wait(FAR if terminal else 0.1) == terminal
            if then:
                raise then
        assert threading.active_count() == threads
        so_far = r"( \d+ s …)+" if terminal else ""
        end = " failed" if then else r" \d+\.\d s"
        assert re.fullmatch(rf"tracing …{so_far}{end}\n", screen.getvalue())


@pytest.mark.parametrize("name", ["a b", "../up", ".hidden", "ä"])
def test_a_name_that_cannot_name_a_bundle_is_refused(
    bare: pathlib.Path, name: str, tmp_path: pathlib.Path
) -> None:
    says = f"{name!r} cannot name a bundle (letters, digits, . - _); give one with --name"
    assert refusal(bare, tmp_path, "--name", name) == f"cannot bake {bare}: {says}"
    if "/" not in name:
        folder = str(tmp_path / name)
        assert refusal(folder, tmp_path) == f"cannot bake {folder}: {says}"


def test_an_output_that_cannot_be_written_is_named(
    bare: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SystemExit, match=f"^cannot bake .*: .*'{tmp_path / 'file'}'$"):
        bake(bare, tmp_path / "file")


def test_the_command_line_ends_with_1_and_one_line(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "bake_model.py", "no/model", "--name", "a b"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr == (
        "cannot bake no/model: 'a b' cannot name a bundle (letters, digits, . - _); "
        "give one with --name\n"
    )


def test_a_second_bake_replaces_the_first_or_leaves_it(
    bert: pathlib.Path, baked: Baked, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(baked.bundle.path, tmp_path / "x")
    (tmp_path / "x" / "of-old").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setitem(PARITY_FLOOR, "fp32", 1.1)  # ends the bake late: everything else is written
        assert "at least 1.1 needed" in refusal(bert, tmp_path, "--name", "x")
    stale = tmp_path / ".x.left"
    stale.mkdir()
    (stale / "text.bin").write_bytes(b"half")
    other = tmp_path / ".x.y.left"  # of a bundle called x.y, which another process may be baking
    other.mkdir()

    bundle = bake(bert, tmp_path, "--name", "x")
    assert bundle.manifest.name == "x" and bundle.manifest.source == "bert"
    assert bundle.manifest.max_tokens == OWN  # the earlier one's was another
    assert {path.name for path in tmp_path.iterdir()} == {"x", other.name}
    assert {path.name for path in bundle.path.iterdir()} == {
        *bundle.manifest.files,
        bundles.MANIFEST,
    }
