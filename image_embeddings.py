"""What a picture's embedding is: bytes -> picture -> pixels -> vector. Knows no HTTP."""

import contextlib
import io
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Imported here, so that the first request does not wait for Pillow to look for its plugins.
from PIL import (  # noqa: F401
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from avif_frames import frame_sizes
from embeddings import Float32, checked_dimensions, shorten_and_scale
from engine import spans
from engine.bundle import Bundle, Preprocessing
from engine.errors import DeadlineExceeded, EmbedderError, InvalidInput
from engine.protocol import Engine
from engine.queue import Queue
from limits import FORMATS, FORMATS_SENTENCE, ImageLimits

UInt8 = npt.NDArray[np.uint8]

# A JPEG is decoded at the smallest scale (1/2, 1/4, 1/8) that leaves its sides at least this many
# times as long as the model's input. Ten photographs on a trained CLIP at scales 1/2 and 1/4:
#   margin  smallest cosine to the full decode  with the mean vector subtracted  mean pixel error
#   2.0     0.99987                             0.9996                           0.75 of 255
#   1.5     0.9997                              0.9988                           1.2
#   1.0     0.9991                              0.9974                           2.4
DRAFT_MARGIN = 2.0
# Pictures of more decoded pixels than this are decoded one at a time in a process. Pillow takes up
# to 11 bytes a pixel (RGBA, white background and RGB): 550 MB at 50 million pixels.
LARGE_PICTURE_PIXELS = 2_000_000
# Smaller pictures decoded at a time. More than the machine has cores would only take memory.
DECODERS = 4
# First bytes of other kinds of files, to name what was sent in the error message.
_OTHERS = (
    (b"%PDF", "a PDF"),
    (b"<svg", "an SVG"),
    (b"<!doctype svg", "an SVG"),
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"8BPS", "a Photoshop file"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\0\0\1\0", "an icon file (ICO)"),
    (b"PK\3\4", "a ZIP archive"),
)

# Turn off Pillow's own limit, which warns: limits.py has ours.
Image.MAX_IMAGE_PIXELS = None
# The cores belong to the engine.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1


@dataclass(frozen=True, slots=True)
class ImageEmbedding:
    """A picture's vector and what it cost."""

    vector: Float32  # shape (dimensions,)
    tokens: int  # what the engine's work for it counts as, see Preprocessing.tokens


class ImageEmbedder:
    """Embeds pictures with one model. Safe to call from any number of threads."""

    # Shared by all models of the process, since they share its memory.
    _large = threading.Semaphore(1)
    _small = threading.Semaphore(DECODERS)

    def __init__(
        self,
        bundle: Bundle,
        preprocessing: Preprocessing,
        engine: Engine,
        queue: Queue,
        limits: ImageLimits,
    ) -> None:
        self.manifest = bundle.manifest
        self.preprocessing, self.limits = preprocessing, limits
        self._engine, self._queue = engine, queue

    def embed(
        self,
        images: Sequence[bytes],
        *,
        deadline: float,
        gone: Callable[[], bool] | None = None,
        tenant: str | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
    ) -> list[ImageEmbedding]:
        """Embed pictures, each a file's bytes. They are decoded in the caller's thread.

        Args:
            deadline: when to give up, on the clock of `time.monotonic`.
            gone: whether the caller has gone, as `Queue.submit` takes it.
            tenant: with whose requests it shares the queue.
            dimensions: keep this many leading values, and normalise again where the vector was
                normalised.
            normalize: whether vectors have length 1; None does as the model does.

        Returns: one ImageEmbedding a picture, in order.
        Raises: InvalidInput (not a picture, broken, too many), InputTooLarge, and what
        `Queue.submit` raises.
        """
        dimensions = checked_dimensions(dimensions, self.manifest)
        cost = self.preprocessing.tokens
        self.limits.check(images, cost)
        pixels = spans.timed(
            spans.DECODE,
            lambda: [self._prepare(data, index, deadline) for index, data in enumerate(images)],
            len(images),
        )
        costs = [cost] * len(pixels)
        vectors = self._queue.submit(self._engine, pixels, costs, deadline, gone, tenant)
        unit = self.manifest.normalized if normalize is None else normalize
        return [ImageEmbedding(row, cost) for row in shorten_and_scale(vectors, dimensions, unit)]

    def _prepare(self, data: bytes, index: int, deadline: float) -> UInt8:
        with _decoding(index):
            picture = open_picture(data, self.limits)
            width, height = drafted_size(picture, self.preprocessing)
            large = width * height > LARGE_PICTURE_PIXELS
            turn = self._large if large else self._small
            if not turn.acquire(timeout=max(0.0, deadline - time.monotonic())):
                raise DeadlineExceeded("the request waited longer than REQUEST_TIMEOUT to decode")
            try:
                return preprocess(picture, self.preprocessing)
            finally:
                turn.release()


@contextlib.contextmanager
def _decoding(index: int) -> Iterator[None]:
    """Turn whatever Pillow raises on a file into InvalidInput for the picture at `index`."""
    try:
        yield
    except InvalidInput as error:
        error.index = index
        raise
    except (EmbedderError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, KeyError…
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise InvalidInput(f"picture cannot be decoded: {what}", index) from None


def open_picture(data: bytes, limits: ImageLimits) -> Image.Image:
    """Recognise a picture by its content and check its header. Its pixels are decoded later.

    Raises: InvalidInput for other formats, named where they are known; InputTooLarge; what Pillow
    raises on a broken file.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise InvalidInput(_not_a_picture(data)) from None
    limits.check_pixels(picture.size)
    if picture.format == "AVIF":
        _check_frames(data, picture.size, limits)
    if picture.format == "PNG":
        picture.verify()  # decoding alone does not verify the checksums of the pixels
        picture = Image.open(io.BytesIO(data), formats=("PNG",))
    if picture.mode in ("I", "F"):
        raise InvalidInput(
            f"32-bit images (mode {picture.mode}) have no defined brightness range; convert to 8 "
            "or 16 bits"
        )
    return picture


def _check_frames(data: bytes, size: tuple[int, int], limits: ImageLimits) -> None:
    """Refuse an AVIF file whose frames are larger than it says: see avif_frames.py."""
    for width, height in frame_sizes(data):
        if width > 2 * size[0] or height > 2 * size[1]:
            raise InvalidInput(
                f"AVIF of {size[0]} x {size[1]} pixels with frames of {width} x {height}"
            )
        limits.check_pixels((width, height))


def _not_a_picture(data: bytes) -> str:
    begin = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, name in _OTHERS:
        if begin.startswith(magic.lower()):
            return f"this is {name}; {FORMATS_SENTENCE}"
    if data[4:8] == b"ftyp":
        return f"this is HEIC or a video; {FORMATS_SENTENCE}"
    if begin.startswith((b"<?xml", b"<!--")):
        kind = "an SVG" if b"<svg" in data[:65_536].lower() else "XML"
        return f"this is {kind}; {FORMATS_SENTENCE}"
    return f"not a picture, or its header is broken; {FORMATS_SENTENCE}"


def resized_size(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Width and height to which the model's processor resizes a picture of (width, height) before
    it crops, rounded as transformers.image_transforms.get_resize_output_image_size rounds.
    """
    width, height = size
    if isinstance(preprocessing.resize, tuple):
        return preprocessing.resize[1], preprocessing.resize[0]
    short = preprocessing.resize
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def drafted_size(picture: Image.Image, preprocessing: Preprocessing) -> tuple[int, int]:
    """Width and height at which a picture is decoded. A JPEG can be decoded at 1/2, 1/4 and 1/8 of
    its size (Pillow's draft mode) in a fraction of the time and memory.
    """
    scale = _draft_scale(picture, preprocessing)
    return math.ceil(picture.width / scale), math.ceil(picture.height / scale)


def _draft_scale(picture: Image.Image, preprocessing: Preprocessing) -> int:
    if not isinstance(picture, JpegImagePlugin.JpegImageFile):
        return 1
    width, height = resized_size(picture.size, preprocessing)
    room = min(picture.width / width, picture.height / height) / DRAFT_MARGIN
    return next((scale for scale in (8, 4, 2) if room >= scale), 1)


def preprocess(picture: Image.Image, preprocessing: Preprocessing) -> UInt8:
    """Decode a picture, resize and crop it as the model's processor does. `Preprocessing.normalize`
    does the rest. An animation is embedded by its first frame.

    EXIF orientation is ignored, as `SentenceTransformer.encode(PIL.Image.open(path))` does. (For
    TIFF files Pillow applies it while decoding, for both.)

    Transparent pixels are put on white, as transformers 5 does. 16-bit greyscale is scaled to 8
    bits; the model's own pipeline would clip it to white.

    Only the part that the crop keeps is resized, so that a picture of 1 x 20,000 pixels costs no
    more than another. The processor resizes it to 4.5 million rows first.

    Returns: uint8 of shape (height, width, 3).
    """
    size = picture.size
    width, height = resized_size(size, preprocessing)
    extent: tuple[float, float] = size  # of the whole picture, in decoded pixels
    scale = _draft_scale(picture, preprocessing)
    if drafted := scale > 1 and picture.draft(None, (size[0] // scale, size[1] // scale)):
        extent = drafted[1][2:]
    rgb = to_rgb(picture)
    crop_height, crop_width = preprocessing.crop or (height, width)
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    # A crop larger than the picture is black outside of it.
    x0, y0 = max(0, left), max(0, top)
    x1, y1 = min(width, left + crop_width), min(height, top + crop_height)
    across, down = extent[0] / width, extent[1] / height
    box = (x0 * across, y0 * down, min(x1 * across, rgb.width), min(y1 * down, rgb.height))
    resampling = Image.Resampling[preprocessing.resampling.upper()]
    pixels = np.asarray(rgb.resize((x1 - x0, y1 - y0), resampling, box=box))
    if pixels.shape[:2] == (crop_height, crop_width):
        return pixels
    whole = np.zeros((crop_height, crop_width, 3), np.uint8)
    whole[y0 - top : y1 - top, x0 - left : x1 - left] = pixels
    return whole


def to_rgb(picture: Image.Image) -> Image.Image:
    """Decode to RGB as transformers.image_transforms.convert_to_rgb does, except for 16-bit
    greyscale (see `preprocess`).
    """
    if picture.mode.startswith("I;16"):
        values = np.asarray(picture)
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        transparent = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, transparent).convert("RGB")
    return picture.convert("RGB")


def probe_picture() -> bytes:
    """A PNG whose vector is in every image bundle, to check the engine when a bundle is loaded."""
    y, x = np.mgrid[0:96, 0:128]
    waves = [np.sin(x / 9 + y / 17), np.sin(y / 7), np.cos((x + y) / 23)]
    pixels = np.stack([127 + 120 * wave for wave in waves], axis=-1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
