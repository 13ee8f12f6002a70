"""engine/recording.py: which recording a batch takes. What needs a GPU is in tests/gpu."""

import pytest

from engine.recording import Room, fitting

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
