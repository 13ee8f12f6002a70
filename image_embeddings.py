"""What a picture's embedding is: bytes -> verified picture -> pixels -> vector. Pillow and NumPy
only; knows no HTTP.
"""

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
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin  # noqa: F401
from PIL import MpoImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin  # noqa: F401
from PIL import UnidentifiedImageError

from embeddings import unit_vectors
from engine.protocol import Engine
from engine.queue import Queue
from engine.bundle import Bundle, Preprocessing
from engine.errors import DeadlineExceeded, EmbedderError, InputTooLarge, InvalidInput

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # as Pillow calls them
FORMATS_SENTENCE = "a picture may be JPEG, PNG, WebP, GIF, BMP or TIFF"
# A JPEG is decoded at the smallest scale (1/2, 1/4, 1/8) that leaves it at least this many times as
# large as the model looks at it. Measured on ten photographs and a trained CLIP at scales 1/2 and
# 1/4: cosine to the full decode at least 0.99987, 0.9996 with the mean vector taken off, and pixels
# 0.75 of 255 off on average. At 1.5 they are 0.9997, 0.9988 and 1.2; at 1.0 0.9991, 0.9974 and 2.4.
DRAFT_MARGIN = 2.0
# Pictures of more pixels than this, as decoded, are decoded one at a time in a process: Pillow
# needs up to 11 bytes a pixel on the way (RGBA, its ground and RGB), 550 MB at 50 million pixels.
LARGE_PICTURE_PIXELS = 2_000_000
# Smaller ones: more at a time than there are cores would only take memory.
DECODERS = 4
# What begins a file of a kind that people take for a picture this service could read.
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

# Every picture's size is checked against MAX_IMAGE_PIXELS below, before it is decoded. Pillow's own
# check at a size of its own would come first, as a warning or with another message.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True, slots=True)
class ImageLimits:
    max_images: int  # a request
    max_image_bytes: int  # one picture, as a file
    max_image_pixels: int  # one picture, width times height
    max_request_tokens: int  # what a request's pictures may cost together


@dataclass(frozen=True, slots=True)
class ImageEmbedding:
    """A picture's vector and what it cost."""

    vector: Float32  # shape (dimensions,)
    tokens: int  # in the batcher's unit; see Preprocessing.tokens


class ImageEmbedder:
    """Embeds pictures with one model. Safe to call from any number of threads."""

    # Shared by all models of a process, as its memory is.
    _large = threading.Semaphore(1)
    _small = threading.Semaphore(DECODERS)

    def __init__(
        self,
        bundle: Bundle,
        preprocessing: Preprocessing,
        engine: Engine,
        batcher: Queue,
        limits: ImageLimits,
    ) -> None:
        self.manifest = bundle.manifest
        self.preprocessing, self.limits = preprocessing, limits
        self._engine, self._batcher = engine, batcher

    def embed(
        self,
        images: Sequence[bytes],
        *,
        deadline: float,
        gone: Callable[[], bool] | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
    ) -> list[ImageEmbedding]:
        """Embed pictures, each a file's bytes. They are decoded in the thread that calls.

        Args:
            deadline: when to give up, on the clock of `time.monotonic`.
            gone: whether nobody waits for the vectors any more, as `Queue.submit` takes it.
            dimensions: keep this many leading values, and normalise what is left.
            normalize: overrides whether vectors have length 1; None does as the model does.

        Returns: one ImageEmbedding a picture, in order.
        Raises: InvalidInput (not a picture, broken, too many), InputTooLarge, and what
        `Queue.submit` raises.
        """
        limits, tokens = self.limits, self.preprocessing.tokens
        if dimensions is not None and not 1 <= dimensions <= self.manifest.dimensions:
            raise InvalidInput(
                f"dimensions is {dimensions}; this model takes 1 to {self.manifest.dimensions}"
            )
        if not images:
            raise InvalidInput("no picture; send at least one")
        if len(images) > limits.max_images:
            raise InvalidInput(
                f"{len(images)} pictures; the limit is {limits.max_images} (MAX_IMAGES_PER_BATCH)"
            )
        if len(images) * tokens > limits.max_request_tokens:
            raise InputTooLarge(
                f"{len(images)} pictures cost {len(images) * tokens} tokens; a request may have "
                f"{limits.max_request_tokens} (MAX_REQUEST_TOKENS)"
            )
        for index, data in enumerate(images):
            if len(data) > limits.max_image_bytes:
                raise InputTooLarge(
                    f"picture has {len(data)} bytes; the limit is {limits.max_image_bytes} "
                    "(MAX_IMAGE_SIZE)",
                    index,
                )
        pixels = [self._prepare(data, index, deadline) for index, data in enumerate(images)]
        costs = [tokens] * len(pixels)
        vectors = self._batcher.submit(self._engine, pixels, costs, deadline, gone)
        unit = self.manifest.normalized if normalize is None else normalize
        if dimensions is not None:
            vectors = vectors[:, :dimensions]
        if unit:
            vectors = unit_vectors(vectors)
        return [ImageEmbedding(vector, tokens) for vector in np.ascontiguousarray(vectors)]

    def _prepare(self, data: bytes, index: int, deadline: float) -> UInt8:
        with _decoding(index):
            picture = open_picture(data, self.limits.max_image_pixels)
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
    """Whatever Pillow raises on a file is the file's fault, and is said of picture `index`."""
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


def open_picture(data: bytes, max_pixels: int) -> Image.Image:
    """A picture of an accepted format, known by its content, with its header read and checked. Its
    pixels are not decoded yet.

    Args:
        max_pixels: most width times height.

    Raises: InvalidInput for anything else, by name where it is known; InputTooLarge; what Pillow
    raises on a broken file.
    """
    if not data:
        raise InvalidInput("picture is empty")
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise InvalidInput(_not_a_picture(data)) from None
    width, height = picture.size
    if width * height > max_pixels:
        raise InputTooLarge(
            f"picture has {width} x {height} pixels; the limit is {max_pixels} in all "
            "(MAX_IMAGE_PIXELS)"
        )
    if picture.format == "PNG":
        picture.verify()  # decoding alone does not look at the checksums of the pixels
        picture = Image.open(io.BytesIO(data), formats=("PNG",))
    if picture.mode in ("I", "F"):
        raise InvalidInput(
            f"picture has pixels of 32-bit numbers (mode {picture.mode}), which say not how bright "
            "they are; convert it to 8 or 16 bits"
        )
    return picture


def _not_a_picture(data: bytes) -> str:
    begin = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, name in _OTHERS:
        if begin.startswith(magic.lower()):
            return f"this is {name}; {FORMATS_SENTENCE}"
    if data[4:8] == b"ftyp":
        return f"this is HEIC, AVIF or a video; {FORMATS_SENTENCE}"
    if begin.startswith((b"<?xml", b"<!--")):
        kind = "an SVG" if b"<svg" in data[:65_536].lower() else "XML"
        return f"this is {kind}; {FORMATS_SENTENCE}"
    return f"not a picture, or its header is broken; {FORMATS_SENTENCE}"


def resized_size(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Width and height to which the model's processor resizes a picture of (width, height), before
    it crops. Rounds as transformers.image_transforms.get_resize_output_image_size does.
    """
    width, height = size
    if isinstance(preprocessing.resize, tuple):
        return preprocessing.resize[1], preprocessing.resize[0]
    short = preprocessing.resize
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def drafted_size(picture: Image.Image, preprocessing: Preprocessing) -> tuple[int, int]:
    """Width and height at which a picture will be decoded; a JPEG's DCT can give it at 1/2, 1/4 and
    1/8 (Pillow's draft mode) for a fraction of the time and memory.
    """
    if not isinstance(picture, JpegImagePlugin.JpegImageFile):
        return picture.size
    scale = _draft_scale(picture.size, preprocessing)
    return math.ceil(picture.width / scale), math.ceil(picture.height / scale)


def _draft_scale(size: tuple[int, int], preprocessing: Preprocessing) -> int:
    wanted = resized_size(size, preprocessing)
    room = min(size[0] / wanted[0], size[1] / wanted[1]) / DRAFT_MARGIN
    return next((scale for scale in (8, 4, 2) if room >= scale), 1)


def preprocess(picture: Image.Image, preprocessing: Preprocessing) -> UInt8:
    """Decode a picture and prepare it as the model's processor does, up to the crop;
    `Preprocessing.normalize` does the rest. Of an animation the first frame is taken.

    EXIF orientation: pixels are taken as they are stored, not turned. So does
    `SentenceTransformer.encode(PIL.Image.open(path))`, on which models of this family were trained
    and measured. (Pillow itself turns TIFFs when it decodes them, here and there.)

    Transparent pixels are laid on white, as transformers 5 does. 16-bit greyscale is scaled to
    8 bits; there the model's own pipeline would clip, and see nearly all of it white.

    Only what the crop keeps is resized, so that a picture of 1 x 20 000 pixels costs no more than
    another (the processor makes 4.5 million rows of it first).

    Returns: uint8 of shape (height, width, 3).
    """
    size = picture.size
    width, height = resized_size(size, preprocessing)
    extent: tuple[float, float] = size  # of the whole picture, in pixels as they are decoded
    if isinstance(picture, JpegImagePlugin.JpegImageFile):
        scale = _draft_scale(size, preprocessing)
        if drafted := scale > 1 and picture.draft(None, (size[0] // scale, size[1] // scale)):
            extent = drafted[1][2:]
    rgb = to_rgb(picture)
    crop_height, crop_width = preprocessing.crop or (height, width)
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    # Where the crop is larger than the picture, what lies outside is black.
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
    """Decode to RGB, as transformers.image_transforms.convert_to_rgb does, but for 16-bit greyscale
    (see `preprocess`).
    """
    if picture.mode.startswith("I;16"):
        values = np.asarray(picture)
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        transparent = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, transparent).convert("RGB")
    return picture.convert("RGB")


def probe_picture() -> bytes:
    """A picture that every bundle has its vector of: whoever loads the bundle can see that it still
    answers so.
    """
    y, x = np.mgrid[0:96, 0:128]
    waves = [np.sin(x / 9 + y / 17), np.sin(y / 7), np.cos((x + y) / 23)]
    pixels = np.stack([127 + 120 * wave for wave in waves], axis=-1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
