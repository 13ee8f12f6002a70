"""avif_frames.py: the sizes of the frames that an AVIF file really has."""

import io
import random
import struct
from typing import Any

import pytest
from PIL import Image

from avif_frames import frame_sizes


def avif(size: tuple[int, int], mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 200 if mode == "L" else "red").save(file, "AVIF", speed=10, **options)
    return file.getvalue()


def says(data: bytes, size: tuple[int, int]) -> bytes:
    """The file with another size in its container (`ispe`)."""
    before, _, after = data.partition(b"ispe")
    return before + b"ispe" + after[:4] + struct.pack(">II", *size) + after[12:]


@pytest.mark.parametrize("size", [(1, 1), (64, 48), (333, 77), (77, 1025)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("options", [{}, {"subsampling": "4:4:4"}, {"quality": 100}], ids=str)
def test_what_pillow_writes(size: tuple[int, int], mode: str, options: dict[str, Any]) -> None:
    assert set(frame_sizes(avif(size, mode, **options))) == {size}


def test_what_the_container_says_does_not_count() -> None:
    assert frame_sizes(says(avif((640, 480)), (8, 8))) == [(640, 480)]


def bits(*fields: tuple[int, int]) -> bytes:
    """Numbers, each with its count of bits."""
    text = "".join(f"{value:0{count}b}" for value, count in fields)
    return int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8))


def unit(payload: bytes, kind: int = 1, *, sized: bool = True) -> bytes:
    if not sized:
        return bytes([kind << 3]) + payload
    return bytes([kind << 3 | 2, len(payload) | 128, 0]) + payload  # a size of two bytes


def box(kind: bytes, data: bytes, *, large: bool = False) -> bytes:
    if large:
        return struct.pack(">I4sQ", 1, kind, len(data) + 16) + data
    return struct.pack(">I4s", len(data) + 8, kind) + data


def file_of(stream: bytes, *, parts: int = 1, in_idat: bool = False, large: bool = False) -> bytes:
    """An AVIF file of one item, in several extents."""
    step = -(-len(stream) // parts)
    at = 0 if in_idat else 24  # the stream comes first, in a box of its own
    spans = [(at + begin, min(step, len(stream) - begin)) for begin in range(0, len(stream), step)]
    located = b"".join(struct.pack(">II", *span) for span in spans)
    iloc = struct.pack(">IBBHHHHH", 1 << 24, 0x44, 0, 1, 1, int(in_idat), 0, len(spans)) + located
    inner = box(b"iloc", iloc, large=large)
    if in_idat:
        inner = box(b"idat", stream) + inner
    ftyp = box(b"ftyp", b"avif" + bytes(4))
    return ftyp + box(b"mdat", b"" if in_idat else stream) + box(b"meta", bytes(4) + inner)


REDUCED = bits((0, 3), (1, 1), (1, 1), (8, 5), (9, 4), (8, 4), (999, 10), (299, 9))
FULL = [(0, 3), (0, 1), (0, 1)]
SIZE = [(9, 4), (8, 4), (599, 10), (299, 9)]
POINT = [(0, 12), (8, 5), (0, 1)]
LONG = [
    *FULL,
    (1, 1),  # timing: two numbers, one in Exp-Golomb code, and the decoder's model
    *((1, 32), (25, 32), (1, 1), (0b00101, 5)),
    *((1, 1), (4, 5), (1, 32), (3, 5), (3, 5)),
    *((1, 1), (1, 5)),  # delays; two operating points
    *POINT,
    *((1, 1), (31, 5), (31, 5), (1, 1), (1, 1), (9, 4)),
    *((1, 12), (7, 5), (0, 1), (0, 1)),
]


@pytest.mark.parametrize(
    "stream, sizes",
    [
        (unit(REDUCED), [(1000, 300)]),
        (unit(REDUCED, sized=False), [(1000, 300)]),
        (unit(b"", 2) + unit(REDUCED) + unit(b"x" * 50, 6), [(1000, 300)]),
        (bytes([0x0E, 0, len(REDUCED)]) + REDUCED, [(1000, 300)]),  # with a layer
        (unit(bits(*FULL, (0, 1), (0, 1), (0, 5), *POINT, *SIZE)), [(1024, 512)]),
        (unit(bits(*LONG, *SIZE)), [(1024, 512)]),
        (unit(REDUCED) + unit(bits(*LONG, *SIZE)), [(1000, 300), (1024, 512)]),
    ],
    ids=["reduced", "without size", "among others", "layer", "full", "long", "two"],
)
@pytest.mark.parametrize("options", [{}, {"parts": 3}, {"in_idat": True}, {"large": True}], ids=str)
def test_every_form_of_a_sequence_header(
    stream: bytes, sizes: list[tuple[int, int]], options: dict[str, Any]
) -> None:
    """Frames may have sizes of their own where the header is no reduced one: as many bits allow."""
    assert frame_sizes(file_of(stream, **options)) == sizes


@pytest.mark.parametrize(
    "data, says",
    [
        (avif((9, 9), save_all=True, append_images=[Image.new("RGB", (9, 9))]), "animated"),
        (file_of(unit(b"", 2)), "no AV1 stream"),
        (file_of(unit(REDUCED[:3])), "truncated"),
        (file_of(unit(b"", 2) * 20_000), "too many parts"),
        (file_of(unit(REDUCED))[:-1], "broken"),
        (file_of(unit(b"x" * 100, 2) * 50, parts=6000), "overlap"),
        (b"", "no AV1 stream"),
        (box(b"meta", b""), "no AV1 stream"),
        (box(b"meta", bytes(4) + box(b"iloc", b"\1\0\0\0\x44\0\xff\xff")), "truncated"),
        (struct.pack(">I4s", 4, b"meta") + bytes(99), "broken"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        frame_sizes(data)


def test_random_damage() -> None:
    """A size or a ValueError, soon."""
    chance = random.Random(5)
    good = avif((64, 48), "RGBA")
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(chance.randrange(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            assert frame_sizes(bytes(data))
        except ValueError:
            pass
