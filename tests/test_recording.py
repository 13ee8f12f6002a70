"""engine/recording.py: which recording a batch takes. What needs a GPU is in tests/gpu."""

import pytest

from engine.recording import SIZES, Room, fitting, full

MADE = [Room(64, 12), Room(128, 16), Room(1024, 72), Room(24_576, 392, least=22_118)]


@pytest.mark.parametrize(
    ("tokens", "texts", "size"),
    [
        (10, 1, 64),
        (64, 12, 64),
        (65, 1, 128),
        (39, 13, 128),  # short texts: the next has room for their number
        (60, 20, 1024),
        (216, 72, 1024),
        (22_118, 300, 24_576),
        (24_576, 392, 24_576),
    ],
)
def test_the_smallest_with_room_for_tokens_and_texts(tokens: int, texts: int, size: int) -> None:
    found = fitting(MADE, tokens, texts)
    assert found is not None and found.size == size


@pytest.mark.parametrize(
    ("tokens", "texts"),
    [
        (24_577, 1),  # more than any has room for
        (24_000, 393),
        (1025, 8),  # far less than the largest is for
        (22_117, 300),
        (219, 73),
    ],
)
def test_others_are_computed_without_a_recording(tokens: int, texts: int) -> None:
    assert fitting(MADE, tokens, texts) is None


@pytest.mark.parametrize("window", [24, 62, 256, 512, 2048, 4096, 8192, 32_768])
@pytest.mark.parametrize("size", SIZES)
def test_a_recording_is_timed_with_as_many_tokens_as_it_has_room_for(
    size: int, window: int
) -> None:
    texts = full(size, window, 7)
    assert sum(map(len, texts)) == size and max(map(len, texts)) <= window
    assert len(texts) == -(-size // window) and set(texts[0]) == {7}
