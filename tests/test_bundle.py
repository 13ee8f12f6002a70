"""engine/bundle.py: complete or absent, and damage is named."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import msgspec
import pytest
from servers import ROOT

from engine import bundle as bundles
from engine.bundle import Bundle, Manifest, Probe, Torch, discover, fingerprint, read, write
from engine.errors import BundleError


def manifest(name: str, **changes: Any) -> Manifest:
    values = dict(
        name=name,
        source=f"org/{name}",
        revision=None,
        created="2026-01-01T00:00:00",
        modalities=["text"],
        dimensions=2,
        max_tokens=8,
        normalized=True,
        similarity="cosine",
        prompts={},
        default_prompt=None,
        files={},
        versions={},
        probe=Probe("x", [1.0, 0.0]),
        parity={},
    )
    return Manifest(**{**values, **changes})


def make(folder: pathlib.Path, name: str, content: bytes = b"data", **changes: Any) -> Bundle:
    def fill(draft: pathlib.Path) -> Manifest:
        (draft / "text.bin").write_bytes(content)
        return manifest(name, files={"text.bin": fingerprint(draft / "text.bin")}, **changes)

    return write(folder, name, fill)


def test_what_is_written_is_read(tmp_path: pathlib.Path) -> None:
    made = make(tmp_path / "models", "a")
    assert read(tmp_path / "models" / "a") == made
    made.verify()
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["a"]


def test_a_second_write_replaces_the_first(tmp_path: pathlib.Path) -> None:
    make(tmp_path, "a", b"old")
    make(tmp_path, "a", b"new")
    assert (tmp_path / "a" / "text.bin").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_failed_write_leaves_what_was_there(tmp_path: pathlib.Path) -> None:
    make(tmp_path, "a", b"old")

    def fill(draft: pathlib.Path) -> Manifest:
        (draft / "text.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    for name in ("a", "b"):
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, name, fill)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "text.bin").read_bytes() == b"old"


def test_what_a_killed_write_left_is_ignored_and_cleared(tmp_path: pathlib.Path) -> None:
    (tmp_path / ".a.left").mkdir()
    (tmp_path / ".a.left" / "text.bin").write_bytes(b"half")
    with pytest.raises(BundleError, match="holds no bundle"):
        discover(tmp_path)
    make(tmp_path, "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(("renames", "kept"), [(0, b"old"), (1, b"old"), (2, b"new")])
def test_a_kill_at_the_renames_leaves_one_bundle(
    renames: int, kept: bytes, tmp_path: pathlib.Path
) -> None:
    """A process that ends itself before the first rename, between the two and after both."""
    program = (
        "import os, pathlib, signal, sys, test_bundle\n"
        "left = int(sys.argv[2])\n"
        "def rename(old, new, rename=os.rename):\n"
        "    global left\n"
        "    if left:\n"
        "        rename(old, new)\n"
        "    left -= 1\n"
        "    if left <= 0:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.rename = rename\n"
        "test_bundle.make(pathlib.Path(sys.argv[1]), 'a', b'new')\n"
    )
    make(tmp_path, "a", b"old")
    command = [sys.executable, "-c", program, str(tmp_path), str(renames)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths})
    assert ended.returncode == -signal.SIGKILL
    for _ in range(100):
        if [path.name for path in tmp_path.iterdir()] == ["a"]:
            break
        time.sleep(0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "text.bin").read_bytes() == kept


def test_damage_is_named(tmp_path: pathlib.Path) -> None:
    made = make(tmp_path, "a")
    (tmp_path / "a" / "text.bin").write_bytes(b"dada")
    with pytest.raises(
        BundleError, match=r"text.bin is damaged \(its sha256 differs; it has 4 of 4 bytes\)"
    ):
        made.verify()
    (tmp_path / "a" / "text.bin").write_bytes(b"dat")
    with pytest.raises(BundleError, match="text.bin is damaged .* it has 3 of 4 bytes"):
        made.verify()
    (tmp_path / "a" / "text.bin").unlink()
    with pytest.raises(BundleError, match="text.bin is missing"):
        made.verify()


def test_files_in_folders_are_checked_too(tmp_path: pathlib.Path) -> None:
    def fill(draft: pathlib.Path) -> Manifest:
        (draft / "torch" / "1_Pooling").mkdir(parents=True)
        (draft / "torch" / "1_Pooling" / "config.json").write_bytes(b"{}")
        made = Bundle(draft, manifest("a"))
        made.record(["torch/1_Pooling/config.json"])
        return made.manifest

    write(tmp_path, "a", fill)
    made = read(tmp_path / "a")
    assert list(made.manifest.files) == ["torch/1_Pooling/config.json"]
    made.verify()
    file = tmp_path / "a" / "torch" / "1_Pooling" / "config.json"
    assert file.stat().st_mode & 0o777 == 0o644 and file.parent.stat().st_mode & 0o777 == 0o755
    file.write_bytes(b"[]")
    with pytest.raises(BundleError, match="torch/1_Pooling/config.json is damaged"):
        made.verify()
    shutil.rmtree(file.parent)
    with pytest.raises(BundleError, match="torch/1_Pooling/config.json is missing"):
        made.verify()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (None, "no readable manifest.json"),
        (b"{", "manifest.json is damaged"),
        (b'"\xff"', "manifest.json is damaged"),
        (b"{}", "manifest.json is damaged"),
        ({"format": 2}, "format 2 is not 3: it was baked by another version"),
        ({"surprise": 1}, "unknown field `surprise`"),
        ({"dimensions": "384"}, "Expected `int`"),
        ({"files": {"../x": {"sha256": "", "size": 0}}}, "a file outside the bundle: '../x'"),
        (
            {"files": {"torch/../../x": {"sha256": "", "size": 0}}},
            "a file outside the bundle: 'torch/../../x'",
        ),
        ({"files": {"/x": {"sha256": "", "size": 0}}}, "a file outside the bundle: '/x'"),
        ({"files": {"": {"sha256": "", "size": 0}}}, "a file outside the bundle: ''"),
    ],
)
def test_a_manifest_that_cannot_be_believed(tmp_path: pathlib.Path, change: Any, says: str) -> None:
    make(tmp_path, "a")
    path = tmp_path / "a" / "manifest.json"
    if change is None:
        path.unlink()
    elif isinstance(change, bytes):
        path.write_bytes(change)
    else:
        path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    with pytest.raises(BundleError) as info:
        read(tmp_path / "a")
    assert says in str(info.value) and str(tmp_path / "a") in str(info.value)


def test_discover_puts_the_first_baked_in_front(tmp_path: pathlib.Path) -> None:
    make(tmp_path, "a", created="2026-02-01T00:00:00")
    make(tmp_path, "b", created="2026-01-01T00:00:00")
    assert [bundle.manifest.name for bundle in discover(tmp_path)] == ["b", "a"]
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    with pytest.raises(BundleError, match="two bundles are called 'a'"):
        discover(tmp_path)
    with pytest.raises(BundleError, match="No such file"):
        discover(tmp_path / "absent")


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "a b", "ä", "x" * 129])
def test_names_that_cannot_name_a_bundle(name: str) -> None:
    assert not bundles.valid_name(name)
    assert bundles.valid_name("all-MiniLM-L6-v2")


def test_the_fingerprint_is_that_of_the_vectors(tmp_path: pathlib.Path) -> None:
    """Copies and bakes on other days have the same; whatever changes vectors changes it."""
    first = make(tmp_path / "one", "a").fingerprint()
    assert len(first) == 12 and int(first, 16) >= 0
    shutil.copytree(tmp_path / "one" / "a", tmp_path / "two" / "copied")
    assert read(tmp_path / "two" / "copied").fingerprint() == first
    same: list[dict[str, Any]] = [
        {"created": "2027-01-01T00:00:00"},
        {"versions": {"torch": "9"}},
        {"source": "elsewhere", "revision": "abc"},
        {"probe": Probe("y", [0.0, 1.0])},
    ]
    for changes in same:
        assert make(tmp_path / "same", "b", **changes).fingerprint() == first, changes
    others: list[dict[str, Any]] = [
        {"content": b"other weights"},
        {"max_tokens": 16},
        {"dimensions": 3},
        {"default_dimensions": 1},
        {"normalized": False},
        {"layer_norm": True},
        {"prompts": {"query": "q: "}},
        {"prompts": {"query": "Q: "}},
        {"prompts": {"query": "q: "}, "default_prompt": "query"},
        {"torch": Torch(code=False, packed=True)},
        {"torch": Torch(code=False, packed=True, alone=True)},
    ]
    found = {make(tmp_path / "others", "a", **changes).fingerprint() for changes in others}
    assert len(found | {first}) == len(others) + 1


def test_the_fingerprint_leaves_out_the_sample_and_defaults(tmp_path: pathlib.Path) -> None:
    made = make(tmp_path, "a")
    first = made.fingerprint()
    (tmp_path / "a" / "sample.npz").write_bytes(b"x")
    made.record(["sample.npz"])
    assert made.fingerprint() == first
    (tmp_path / "a" / "tokenizer.json").write_bytes(b"{}")
    made.record(["tokenizer.json"])
    assert made.fingerprint() != first
    # A field that a later version adds, with a default.
    made.manifest.torch = Torch(code=False, packed=True)
    now = made.fingerprint()
    later = msgspec.defstruct(
        "Later", [("more", int, 0)], bases=(Torch,), kw_only=True, frozen=True
    )
    made.manifest.torch = later(code=False, packed=True)
    assert made.fingerprint() == now
    made.manifest.torch = later(code=False, packed=True, more=1)
    assert made.fingerprint() != now
