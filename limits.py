"""The limits on texts and pictures of a request, and the errors over them: InputTooLarge (413), and
InvalidInput (400) for no inputs, too many, or empty ones. The numbers come from settings.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from engine.errors import InputTooLarge, InvalidInput

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")  # of pictures, as Pillow calls them
FORMATS_SENTENCE = "a picture may be JPEG, PNG, WebP, AVIF, GIF, BMP or TIFF"


@dataclass(frozen=True, slots=True)
class TextLimits:
    max_texts: float = inf  # texts of a request
    max_text_bytes: float = inf  # bytes of a text, as UTF-8
    max_request_tokens: float = inf  # tokens of all chunks, special tokens and prompts included
    count_setting: str = "MAX_INPUTS"  # which setting has `max_texts`, for the error

    def check(self, texts: Sequence[str]) -> None:
        """Raises: InvalidInput, InputTooLarge."""
        self.check_count(len(texts))
        limit = self.max_text_bytes
        for index, text in enumerate(texts):
            if not text or text.isspace():
                raise InvalidInput("text is empty or only white space", index)
            size = len(text) if text.isascii() else len(text.encode())
            if size > limit:
                message = f"text has {size} bytes; the limit is {limit} (MAX_TEXT_SIZE)"
                raise InputTooLarge(message, index)

    def check_count(self, texts: int, noun: str = "text") -> None:
        """Raises: InvalidInput for no texts, or too many, which it calls `noun`."""
        _check_count(texts, noun, self.max_texts, self.count_setting)

    def check_tokens(self, total: int, index: int) -> None:
        """Raises: InputTooLarge if the texts up to `index` have too many tokens together."""
        limit = self.max_request_tokens
        if total > limit:
            message = f"{total} tokens up to here; a request may have {limit} (MAX_REQUEST_TOKENS)"
            raise InputTooLarge(message, index)


@dataclass(frozen=True, slots=True)
class ImageLimits:
    max_images: float = inf  # pictures of a request
    max_image_bytes: float = inf  # bytes of a picture's file
    max_image_pixels: float = inf  # width times height of a picture
    max_request_tokens: float = inf  # cost of a request's pictures together

    def check(self, images: Sequence[bytes], cost: int) -> None:
        """Args:
            cost: tokens of a picture.

        Raises: InvalidInput, InputTooLarge.
        """
        _check_count(len(images), "picture", self.max_images, "MAX_IMAGES_PER_BATCH")
        total, limit = len(images) * cost, self.max_request_tokens
        if total > limit:
            raise InputTooLarge(
                f"{len(images)} pictures cost {total} tokens; a request may have {limit} "
                "(MAX_REQUEST_TOKENS)"
            )
        limit = self.max_image_bytes
        for index, data in enumerate(images):
            if not data:
                raise InvalidInput("picture is empty", index)
            if len(data) > limit:
                message = f"picture has {len(data)} bytes; the limit is {limit} (MAX_IMAGE_SIZE)"
                raise InputTooLarge(message, index)

    def check_pixels(self, size: tuple[int, int]) -> None:
        """Raises: InputTooLarge for a picture of too large a (width, height)."""
        width, height = size
        if width * height > self.max_image_pixels:
            raise InputTooLarge(
                f"picture has {width} x {height} pixels; the limit is {self.max_image_pixels} in "
                "all (MAX_IMAGE_PIXELS)"
            )


def _check_count(count: int, noun: str, limit: float, setting: str) -> None:
    if not count:
        raise InvalidInput(f"no {noun}; send at least one")
    if count > limit:
        raise InvalidInput(f"{count} {noun}s; the limit is {limit} ({setting})")
