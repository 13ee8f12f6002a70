"""requirements*.txt: made of requirements/ by `make lock`, whole, with hashes, for every Python."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import yaml
from servers import ROOT

SOURCES = {path.stem: path for path in (ROOT / "requirements").glob("*.in")}
CUDA = re.compile(r"torch$|triton$|cuda-|nvidia-")


def lock(name: str) -> pathlib.Path:
    return ROOT / ("requirements.txt" if name == "run" else f"requirements-{name}.txt")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: pathlib.Path) -> dict[str, set[str]]:
    """Versions of each package; several where Pythons need different ones."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([\w.+]+)", path.read_text(), re.MULTILINE):
        found.setdefault(normal(name), set()).add(version)
    return found


def wanted(path: pathlib.Path) -> dict[str, set[str]]:
    """What a file of requirements/ names, with those that it includes."""
    found = pins(path)
    for other in re.findall(r"^-r (\S+)", path.read_text(), re.MULTILINE):
        found |= wanted(path.parent / other)
    return {name: versions for name, versions in found.items() if not CUDA.match(name)}


def test_what_has_no_hashes_is_pinned_at_least() -> None:
    """torch, and what is installed without what it would bring."""
    unlocked = {*ROOT.glob("requirements*.txt")} - {lock(name) for name in SOURCES}
    unlocked.remove(ROOT / "requirements-cl100k.txt")  # one file of it is used, by its sha256
    assert ROOT / "requirements-torch.txt" in unlocked
    for path in unlocked:
        lines = re.findall(r"^[^#\n]+", path.read_text(), re.MULTILINE)
        assert lines and all(re.match(r"[\w.-]+==[\w.]+", line) for line in lines), path
    assert pins(ROOT / "requirements-torch.txt").items() <= pins(SOURCES["run"]).items()


@pytest.mark.parametrize("name", SOURCES)
def test_a_lock_has_what_its_source_names_and_hashes_of_all(name: str) -> None:
    assert wanted(SOURCES[name]).items() <= pins(lock(name)).items(), "run make lock"
    entries = re.split(r"\n(?=\S)", lock(name).read_text().partition("make lock\n")[2].rstrip())
    for entry in entries:
        assert re.match(
            r"[\w.-]+==\S+( ; .+)? \\\n(    --hash=sha256:[0-9a-f]{64}( \\\n)?)+$", entry
        )
        assert not CUDA.match(entry.partition("=")[0])
    assert "://" not in lock(name).read_text()


def test_serving_runs_at_the_versions_that_bake_and_are_tested() -> None:
    serve, run, dev = (pins(lock(name)) for name in ("serve", "run", "dev"))
    assert serve.items() <= run.items() <= dev.items()
    assert pins(lock("plot")).items() <= dev.items()
    assert pins(lock("otel")).items() <= dev.items()


def test_make_says_which_python_it_needs(tmp_path: pathlib.Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    tested = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    low, high = tested[0].replace(".", ", "), tested[-1].replace(".", ", ")
    assert f"not ({low}) <= v <= ({high})" in makefile
    assert f"Python {tested[0]} to {tested[-1]}" in (ROOT / "README.md").read_text()
    old = tmp_path / "python"
    fake = "import sys; sys.version_info = (3, 9); exec(sys.argv[2])"
    old.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{fake}' \"$@\"\n")
    old.chmod(0o755)
    command = ["make", f"VENV={tmp_path}/venv", f"PYTHON={old}", f"{tmp_path}/venv/.run"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode != 0 and not (tmp_path / "venv").exists()
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert said == [
        "This is Python 3.9. The service needs 3.11 to 3.14: make run PYTHON=python3.12, or "
        "another that you have."
    ]
