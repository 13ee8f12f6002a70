"""How large the frames of an AVIF file can be, read from the AV1 streams in it.

The size that the file's container states need not be that of its frames: libavif decodes whatever
the stream holds, up to 268 million pixels, and then scales it to the size that was stated. So 1 kB
could cost gigabytes of memory.
"""

from collections.abc import Iterator

# More than any still picture has: it has an item for each part of a grid, four units in each.
_MAX_EXTENTS, _MAX_UNITS = 4096, 16_384
_SEQUENCE_HEADER = 1


def frame_sizes(data: bytes) -> list[tuple[int, int]]:
    """Largest (width, height) that each sequence header in the file allows.

    Raises: ValueError for an animation, whose frames are not looked for, and for a broken file.
    """
    sizes, units = [], 0
    try:
        for item in _items(data):
            for kind, payload in _units(item):
                units += 1
                if units > _MAX_UNITS:
                    raise ValueError("it has too many parts")
                if kind == _SEQUENCE_HEADER:
                    sizes.append(_largest_frame(_Bits(payload)))
    except IndexError:
        raise ValueError("it is truncated") from None
    if not sizes:
        raise ValueError("it has no AV1 stream")
    return sizes


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Type, begin and end of each box (ISO/IEC 14496-12, 4.2)."""
    while at + 8 <= end:
        size, kind, begin = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8], at + 8
        if size == 1:
            size, begin = int.from_bytes(data[begin : begin + 8]), begin + 8
        following = at + size if size else end
        if following < begin or following > end:
            raise ValueError("its boxes are broken")
        yield kind, begin, following
        at = following


def _items(data: bytes) -> Iterator[bytes]:
    """The bytes of every item that the file's `iloc` locates (8.11.3)."""
    for kind, begin, end in _boxes(data, 0, len(data)):
        if kind == b"moov":
            raise ValueError("animated AVIF is not taken; send its first frame")
        if kind == b"meta":
            inner = {name: (at, to) for name, at, to in _boxes(data, begin + 4, end)}
            if b"iloc" in inner:
                yield from _located(data, *inner[b"iloc"], inner.get(b"idat", (0, 0))[0])


def _located(data: bytes, at: int, end: int, idat: int) -> Iterator[bytes]:
    def number(size: int) -> int:
        nonlocal at
        if at + size > end:
            raise IndexError
        at += size
        return int.from_bytes(data[at - size : at])

    version, sizes = number(4) >> 24, number(2)
    offset_size, length_size, base_size, index_size = (
        sizes >> shift & 15 for shift in (12, 8, 4, 0)
    )
    extents = total = 0
    for _ in range(number(2 if version < 2 else 4)):
        number(2 if version < 2 else 4)  # its id
        within = idat if version and number(2) & 15 == 1 else 0
        number(2)
        base, parts = within + number(base_size), []
        for _ in range(number(2)):
            number(index_size if version else 0)
            begin, length = base + number(offset_size), number(length_size)
            parts.append(data[begin : begin + length if length else len(data)])
            extents, total = extents + 1, total + len(parts[-1])
            if extents > _MAX_EXTENTS or total > len(data):
                raise ValueError("its parts overlap")
        yield b"".join(parts)


def _units(item: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and payload of each unit of an AV1 stream (AV1 specification, 5.3). What is no such
    stream has units of any type.
    """
    at = 0
    while at < len(item):
        head, size = item[at], 0
        at += 2 if head & 4 else 1
        if head & 2:
            for shift in range(0, 56, 7):
                byte = item[at]
                size |= (byte & 127) << shift
                at += 1
                if byte < 128:
                    break
        else:
            size = len(item) - at
        yield head >> 3 & 15, item[at : at + size]
        at += size


class _Bits:
    def __init__(self, data: bytes) -> None:
        self._number, self._left = int.from_bytes(data[:256]), 8 * min(len(data), 256)

    def __call__(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise IndexError
        return self._number >> self._left & (1 << count) - 1


def _largest_frame(bits: _Bits) -> tuple[int, int]:
    """Read a sequence header up to its sizes (AV1 specification, 5.5.1)."""
    bits(4)  # profile, still picture
    reduced = bits(1)
    if reduced:
        bits(5)
    else:
        delay = _skip_timing(bits) if bits(1) else None
        initial_delays = bits(1)
        for _ in range(bits(5) + 1):
            bits(12)
            if bits(5) > 7:
                bits(1)
            if delay is not None and bits(1):
                bits(2 * delay + 1)
            if initial_delays and bits(1):
                bits(4)
    width_bits, height_bits = bits(4) + 1, bits(4) + 1
    width, height = bits(width_bits) + 1, bits(height_bits) + 1
    # Frames may have a size of their own, of as many bits, unless the header is a reduced one.
    return (width, height) if reduced else (1 << width_bits, 1 << height_bits)


def _skip_timing(bits: _Bits) -> int | None:
    """Returns: the bits of a delay, where the decoder's model is described."""
    bits(64)
    if bits(1):  # a number in Exp-Golomb code
        zeros = 0
        while not bits(1):
            zeros += 1
        bits(zeros if zeros < 32 else 0)
    if not bits(1):
        return None
    delay = bits(5) + 1
    bits(42)
    return delay
