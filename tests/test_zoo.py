"""tests/zoo.py: a kind is baked and served, or refused in one line; docs/models.md has them all."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import zoo
from servers import ROOT
from test_docs_tables import rows, section
from zoo_kinds import KINDS, LARGE

BAKED: zoo.Row = {
    "kind": "a",
    "bundle": True,
    "window": 8192,
    "precisions": {
        "fp32": {"engine": "own engine", "cosines": [1.0000002, 0.999999, 1.0]},
        "bf16": {"engine": "OpenVINO", "cosines": [0.99985, 0.99979999, 0.9999]},
    },
    "pictures": False,
    "seconds": 12.3,
    "megabytes": 1234,
    "cosine": 0.9999,
}
REFUSED: zoo.Row = {"kind": "b|c", "bundle": False, "made": True, "clean": True, "line": "it is"}


def test_the_documentation_has_every_kind() -> None:
    """But for the large ones, which take long to bake."""
    names = [cells[0] for cells in rows(section("docs/models.md", "Tested kinds of models"))]
    assert {*names} - {*LARGE} == {*KINDS, "kind", "refused kind"}
    assert len({*names}) == len(names) >= 60


def test_the_table() -> None:
    baked, refused = zoo.table([BAKED, REFUSED]).strip().split("\n\n")
    assert baked.splitlines()[2] == (
        "| a | 8,192 | own engine and OpenVINO | 1.00000 / 0.99999 | 0.99985 / 0.99979 | no | "
        "12 s, 1,234 MB |"
    )
    assert refused.splitlines()[2] == "| b\\|c | it is |"


def test_a_kind_that_was_baked_again_has_its_last_result(tmp_path: pathlib.Path) -> None:
    results = tmp_path / "results"
    lines = [{**BAKED, "window": 1}, REFUSED, {**BAKED, "window": 2}]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert {kind: row.get("window") for kind, row in zoo.read(results).items()} == {
        "a": 2,
        "b|c": None,
    }


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (BAKED, ""),
        (REFUSED, ""),
        ({**BAKED, "cosine": 0.9}, "served at cosine 0.90000"),
        ({**REFUSED, "clean": False}, "no clean refusal: it is"),
        ({**REFUSED, "made": False}, "not made: it is"),
    ],
)
def test_what_is_wrong_with_a_result(row: Any, says: str) -> None:
    assert zoo.judge(row).strip() == says


@pytest.mark.usefixtures("torch_child")
def test_a_kind_is_baked_and_served_or_refused(tmp_path: pathlib.Path) -> None:
    results = tmp_path / "results"
    command = [
        sys.executable,
        "tests/zoo.py",
        "model2vec",
        "ColBERT of PyLate",
        "--results",
        results,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    baked, refused = zoo.read(results).values()
    assert baked["window"] == 8192 and 0.9999 <= baked["cosine"] <= 1.0001
    assert baked["precisions"]["fp32"]["engine"] == "OpenVINO"
    assert baked["seconds"] > 0.5 and baked["megabytes"] > 100
    assert refused["line"].startswith("it is a multi-vector model") and refused["clean"]
