"""image_embeddings.py: the pixels a model sees are those its own processor makes."""

import io
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import sklearn.datasets
import transformers
from PIL import Image, ImageOps, PngImagePlugin

import image_embeddings
from bake.samples import sample_pictures
from engine.bundle import Preprocessing, read
from engine.errors import DeadlineExceeded, InputTooLarge, InvalidInput
from engine.openvino_backend import OpenVINOImageEngine
from engine.queue import Queue
from image_embeddings import (
    ImageEmbedder,
    drafted_size,
    open_picture,
    preprocess,
    probe_picture,
)
from limits import ImageLimits

CLIP = Preprocessing(
    resize=224,
    crop=(224, 224),
    resampling="bicubic",
    scale=1 / 255,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    tokens=50,
)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photos() -> list[Image.Image]:
    """Two photographs of 640 x 427 that come with scikit-learn, and parts of them."""
    whole = [Image.fromarray(array) for array in sklearn.datasets.load_sample_images().images]
    boxes = ((0, 0, 480, 427), (160, 0, 640, 427), (80, 40, 560, 400), (200, 20, 620, 400))
    return whole + [photo.crop(box) for photo in whole for box in boxes]


def pixels(data: bytes, preprocessing: Preprocessing = CLIP) -> Any:
    return preprocess(open_picture(data, ImageLimits()), preprocessing)


def pillow(data: bytes) -> Any:
    """A file's first frame as Pillow opens it, prepared as `pixels` does."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    return pixels(encoded(picture))


@pytest.mark.parametrize("size", [64, 224])
@pytest.mark.parametrize("kind", ["clip", "clip, larger crop", "siglip"])
def test_pixels_are_those_of_the_models_own_processor(size: int, kind: str) -> None:
    """Mean difference at most 1/255 of each picture, on photos too, drafted or not."""
    square = {"height": size, "width": size}
    if kind == "siglip":
        processor = transformers.SiglipImageProcessorPil(size=square)
        half = (0.5, 0.5, 0.5)
        own = msgspec.structs.replace(CLIP, resize=(size, size), crop=None, mean=half, std=half)
    else:
        crop = size if kind == "clip" else size + 17
        processor = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": crop, "width": crop}
        )
        own = msgspec.structs.replace(CLIP, resize=size, crop=(crop, crop))
    files = [*sample_pictures(), *(encoded(photo, "JPEG", quality=90) for photo in photos())]
    for data in files:
        picture = Image.open(io.BytesIO(data))
        expected = processor(picture)["pixel_values"][0]
        actual = own.normalize(pixels(data, own)[np.newaxis])[0]
        assert actual.dtype == np.float32 and actual.shape == expected.shape
        unscaled = np.abs(actual - expected) * np.array(own.std)[:, None, None]
        assert unscaled.mean() <= 1 / 255, (picture.format, picture.mode, picture.size)


GREY = Image.linear_gradient("L").resize((300, 240))
COLOR = Image.merge("RGB", [GREY, GREY.rotate(180), Image.radial_gradient("L").resize((300, 240))])
CLEAR = COLOR.copy()
CLEAR.putalpha(GREY)


@pytest.mark.parametrize(
    "data",
    [
        encoded(COLOR, "JPEG"),
        encoded(COLOR, "JPEG", progressive=True),
        encoded(COLOR.convert("CMYK"), "JPEG"),
        encoded(GREY, "JPEG"),
        encoded(COLOR),
        encoded(COLOR.quantize(16)),
        encoded(GREY.convert("1")),
        encoded(GREY),
        encoded(COLOR, interlace=1),
        encoded(COLOR, "WEBP", lossless=True),
        encoded(COLOR, "WEBP"),
        encoded(COLOR, "AVIF"),
        encoded(COLOR, "AVIF", subsampling="4:4:4", quality=100),
        encoded(GREY, "AVIF"),
        encoded(COLOR, "GIF"),
        encoded(COLOR, "GIF", save_all=True, append_images=[GREY, GREY]),
        encoded(COLOR, "WEBP", save_all=True, append_images=[GREY.convert("RGB")] * 3),
        encoded(COLOR, "BMP"),
        encoded(GREY.convert("1"), "BMP"),
        encoded(COLOR, "TIFF"),
        encoded(COLOR, "TIFF", compression="jpeg"),
        encoded(COLOR.convert("CMYK"), "TIFF", compression="tiff_lzw"),
        encoded(GREY.convert("1"), "TIFF", compression="group4"),
    ],
    ids=lambda data: ascii(data[:8]),
)
def test_every_format_is_read_as_pillow_does(data: bytes) -> None:
    assert np.array_equal(pixels(data), pillow(data))


def test_transparent_pixels_are_laid_on_white() -> None:
    white = Image.new("RGBA", CLEAR.size, "white")
    expected = pixels(encoded(Image.alpha_composite(white, CLEAR).convert("RGB")))
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(pixels(encoded(CLEAR, kind)), expected)
    lossless = {"quality": 100, "subsampling": "4:4:4", "speed": 10}
    glass = encoded(Image.new("RGBA", (9, 9), (0, 0, 0, 0)), "AVIF", **lossless)
    assert pixels(glass).min() == 255
    glass = encoded(Image.new("LA", (9, 9), (0, 0)))
    assert pixels(glass).min() == 255
    pale = Image.new("P", (9, 9), 0)
    assert pixels(encoded(pale, "GIF", transparency=0)).min() == 255


def test_16_bits_are_scaled_not_clipped() -> None:
    wide = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(pixels(encoded(wide, kind)), pixels(encoded(GREY)))


def test_exif_orientation_is_not_followed() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(COLOR, "JPEG", exif=exif, quality=95)
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(turned))).size == (240, 300)
    assert np.array_equal(pixels(turned), pixels(encoded(COLOR, "JPEG", quality=95)))


@pytest.mark.parametrize("scale", [2, 4])
def test_drafting_keeps_the_vector_of_a_photo(
    scale: int, embedder: ImageEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Photos just large enough to be decoded at 1/2 and 1/4: cosine to the full decode."""
    short = image_embeddings.DRAFT_MARGIN * scale * embedder.preprocessing.shape[0]
    files = []
    for photo in photos():
        factor = (short + 1) / min(photo.size)
        size = round(photo.width * factor), round(photo.height * factor)
        files.append(encoded(photo.resize(size, Image.Resampling.LANCZOS), "JPEG", quality=90))
        width, height = drafted_size(open_picture(files[-1], ImageLimits()), embedder.preprocessing)
        assert (width, height) == (-(-size[0] // scale), -(-size[1] // scale))
    drafted = vectors(embedder, files)
    monkeypatch.setattr(image_embeddings, "_draft_scale", lambda *_: 1)
    whole = vectors(embedder, files)
    assert not np.array_equal(drafted, whole)
    lengths = np.linalg.norm(drafted, axis=1) * np.linalg.norm(whole, axis=1)
    assert ((drafted * whole).sum(axis=1) / lengths).min() >= 0.9995


def test_a_small_jpeg_is_not_drafted() -> None:
    for size, drafted in (((640, 480), (640, 480)), ((1200, 896), (600, 448))):
        picture = open_picture(encoded(Image.new("RGB", size), "JPEG"), ImageLimits())
        assert drafted_size(picture, CLIP) == drafted


# The embedder

LIMITS = ImageLimits(30, 1_000_000, 1_000_000, 1000)


@pytest.fixture(scope="module")
def embedder(clip_models_dir: pathlib.Path) -> Iterator[ImageEmbedder]:
    bundle = read(clip_models_dir / "tiny-clip")
    engine = OpenVINOImageEngine(bundle, "fp32", streams=1)
    batcher = Queue(max_batch_size=8, max_batch_tokens=512, max_queue_tokens=9999, threads=1)
    batcher.start()
    yield ImageEmbedder(bundle, engine.preprocessing, engine, batcher, LIMITS)
    batcher.close()


def vectors(embedder: ImageEmbedder, files: list[bytes], **options: Any) -> Any:
    embedded = embedder.embed(files, deadline=time.monotonic() + 60, **options)
    assert all(embedding.tokens == embedder.preprocessing.tokens for embedding in embedded)
    return np.stack([embedding.vector for embedding in embedded])


def test_the_probe_picture_gives_its_vector(embedder: ImageEmbedder) -> None:
    expected = np.array(embedder.manifest.image_probe)
    assert np.allclose(vectors(embedder, [probe_picture()])[0], expected, atol=0.01)


def test_order_dimensions_and_length(embedder: ImageEmbedder) -> None:
    files = sample_pictures()[:20]
    together = vectors(embedder, files)
    alone = np.stack([vectors(embedder, [data])[0] for data in files])
    assert together.shape == (20, 32) and np.allclose(together, alone, atol=1e-4)
    unit = vectors(embedder, files, normalize=True, dimensions=7)
    cut = together[:, :7] / np.linalg.norm(together[:, :7], axis=1)[:, None]
    assert np.allclose(unit, cut, atol=1e-4)


@pytest.mark.parametrize("dimensions", [0, 33])
def test_dimensions_out_of_range(embedder: ImageEmbedder, dimensions: int) -> None:
    with pytest.raises(InvalidInput, match=f"is {dimensions}; this model takes 1 to 32") as info:
        vectors(embedder, [probe_picture()], dimensions=dimensions)
    assert (info.value.field, info.value.index) == ("dimensions", None)


def test_limits_and_what_they_say(embedder: ImageEmbedder) -> None:
    good = probe_picture()
    for images, kind, index, says in (
        ([], InvalidInput, None, "at least one"),
        ([good] * 31, InvalidInput, None, r"31 pictures.* 30 \(MAX_IMAGES_PER_BATCH\)"),
        ([good, bytes(1_000_001)], InputTooLarge, 1, r"1000001 .* 1000000 \(MAX_IMAGE_SIZE\)"),
        ([good, encoded(Image.new("1", (1001, 1000)))], InputTooLarge, 1, "1001 x 1000 .*PIXELS"),
        ([good, good, b""], InvalidInput, 2, "empty"),
        ([encoded(Image.new("F", (9, 9)), "TIFF")], InvalidInput, 0, "no defined brightness range"),
    ):
        with pytest.raises(kind, match=says) as info:
            vectors(embedder, images)
        assert (info.value.field, info.value.index) == (None, index)
    few = ImageEmbedder.__new__(ImageEmbedder)
    few.__dict__ = {**embedder.__dict__, "limits": ImageLimits(max_request_tokens=100)}
    with pytest.raises(InputTooLarge, match=r"cost \d+ tokens.* 100 \(MAX_REQUEST_TOKENS\)"):
        vectors(few, [good] * 30)


def test_large_pictures_wait_for_their_turn_and_small_ones_pass(embedder: ImageEmbedder) -> None:
    large = encoded(Image.new("1", (1500, 1500)))
    few = ImageEmbedder.__new__(ImageEmbedder)
    few.__dict__ = {**embedder.__dict__, "limits": ImageLimits()}
    with ImageEmbedder._large:  # somebody decodes one
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            few.embed([large], deadline=time.monotonic() + 0.2)
        assert time.monotonic() - started < 2
        assert vectors(few, [probe_picture()]).shape == (1, 32)
    assert vectors(few, [large]).shape == (1, 32)


def test_a_text_bomb_in_a_png_is_refused() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("x", "a" * 50_000_000, zip=True)
    with pytest.raises((InvalidInput, ValueError)):
        open_picture(encoded(Image.new("1", (9, 9)), pnginfo=info), ImageLimits())
