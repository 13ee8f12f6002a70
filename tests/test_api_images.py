"""The routes for pictures over HTTP: every way to send one, what pictures and texts have to do with
each other, and bad input, each followed by a good request.
"""

import base64
import io
import pathlib
import random
import select
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import tiny_clip
from PIL import Image
from servers import KEY, Server, serve
from test_avif_frames import says

from bake.samples import sample_pictures
from engine.bundle import PARITY_FLOOR
from main import WIDEN_AFTER

SHAPE = (120, 90)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def shape(color: str, kind: str = "square", seed: int = 1) -> bytes:
    return encoded(tiny_clip.picture(color, kind, random.Random(seed)))


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def see(server: Server, data: bytes, **fields: Any) -> Any:
    """A picture's vector, by a good request."""
    response = server.post("/embeddings/image", {"image": text(data), **fields})
    assert response.status_code == 200, response.text
    return np.array(response.json()["embeddings"][0])


def refusal(response: httpx.Response, status: int, error_type: str, *parts: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error", "error_type"} and body["error_type"] == error_type
    assert all(part in body["error"] for part in parts), body["error"]


def cosines(a: Any, b: Any) -> Any:
    a, b = np.atleast_2d(a), np.atleast_2d(b)
    return (a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T


def memory(server: Server) -> int:
    """Peak memory of the worker, in bytes (VmHWM)."""
    return _status(server, "VmHWM")


def _status(server: Server, name: str) -> int:
    pid = server.process.pid
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    lines = pathlib.Path(f"/proc/{children[0]}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@pytest.fixture(scope="module")
def small(clip_models_dir: pathlib.Path) -> Iterator[Server]:
    """The service with limits that are easy to reach."""
    limits = {"MAX_IMAGE_SIZE": "5000", "MAX_IMAGE_PIXELS": "12000", "MAX_IMAGES_PER_BATCH": "3"}
    with serve(clip_models_dir, PRECISION="fp32", MAX_BODY_SIZE="60000", **limits) as server:
        yield server


@pytest.fixture(autouse=True)
def unharmed(clip_service: Server, small: Server) -> Iterator[None]:
    """After every test a good picture and a good text get their vectors, and no log has a
    traceback."""
    yield
    for server in (clip_service, small):
        assert see(server, shape("red")).shape == (32,)
        assert server.embed("a red square")
        assert "Traceback" not in server.log


# Good input


def test_every_way_to_send_a_picture_gives_the_same_vector(clip_service: Server) -> None:
    data = shape("blue", "circle")
    wrapped = base64.encodebytes(data).decode()  # with line breaks, as `base64 FILE` has them
    answers = [
        clip_service.post("/embeddings/image", {"image": text(data)}),
        clip_service.post("/embeddings/image", {"image": wrapped, "model": "tiny-clip"}),
        clip_service.post("/embeddings/image", {"image": f"data:image/png;base64,{text(data)}"}),
        clip_service.post("/embeddings/image", {"image": f"data:;base64,{text(data)}"}),
        clip_service.post("/embeddings/image", files={"anything": ("x.png", data)}),
        clip_service.post("/embeddings/image", files={"f": ("x", data, "text/plain")}),
    ]
    for kind in ("image/png", "image/jpeg", "image/x-whatever; charset=x"):
        headers = {"Content-Type": kind}  # what it is, its content says
        answers.append(clip_service.post("/embeddings/image", content=data, headers=headers))
    assert {answer.status_code for answer in answers} == {200}
    bodies = [answer.json() for answer in answers]
    assert all(body == bodies[0] for body in bodies)
    ((*vector,),) = bodies[0]["embeddings"]
    assert len(vector) == 32


def test_a_batch_keeps_its_order_in_json_and_in_files(clip_service: Server) -> None:
    pictures = [shape(color, kind) for color, kind in tiny_clip.KINDS[:20]]
    alone = np.array([see(clip_service, data) for data in pictures])
    batch = clip_service.post("/embeddings/image/batch", {"images": list(map(text, pictures))})
    # Fields of two names in turn: the order is that of the files.
    files = [("ab"[number % 2], (f"{number}", data)) for number, data in enumerate(pictures)]
    parts = clip_service.post("/embeddings/image/batch", files=files)
    for response in (batch, parts):
        assert response.status_code == 200, response.text
        rows = np.array(response.json()["embeddings"])
        assert rows.shape == (20, 1, 32)
        assert np.diag(cosines(rows[:, 0], alone)).min() > 0.99999


def test_dimensions_in_json_query_and_field(clip_service: Server) -> None:
    data, path = shape("green"), "/embeddings/image"
    whole = see(clip_service, data)
    raw = {"content": data, "headers": {"Content-Type": "image/png"}}
    for response in (
        clip_service.post(path, {"image": text(data), "dimensions": 5}),
        clip_service.post(f"{path}?dimensions=5", **raw),
        clip_service.post(path, files={"x": ("x", data)}, data={"dimensions": "5"}),
    ):
        assert np.allclose(response.json()["embeddings"][0], whole[:5], atol=1e-5), response.text
    everywhere = (
        {"json": {"image": text(data)}},
        {"json": {"image": text(data), "dimensions": 5}},
        {"files": {"x": ("x", data)}},
        {"files": {"x": ("x", data)}, "data": {"dimensions": "5", "model": "tiny-clip"}},
        raw,
    )
    for sent in everywhere:
        response = clip_service.post(f"{path}?dimensions=5", **sent)
        assert np.allclose(response.json()["embeddings"][0], whole[:5], atol=1e-5), response.text
        response = clip_service.post(f"{path}?model=nope", **sent)
        status = 400 if "data" in sent else 404  # two models are named
        assert response.status_code == status, response.text
        for query, wrong in (
            ("dimensions=5&dimensions=5", "`dimensions` is given twice"),
            ("prompt_name=query", "unknown field `prompt_name`"),
            ("dimensions=five", "$.dimensions"),
        ):
            response = clip_service.post(f"{path}?{query}", **sent)
            refusal(response, 400, "validation", "query parameter", wrong)
    for sent in (everywhere[1], everywhere[3]):
        response = clip_service.post(f"{path}?dimensions=6", **sent)
        refusal(response, 400, "validation", "$.dimensions and the query's dimensions differ")
    parts = [("x", ("x", data)), ("dimensions", (None, "5")), ("dimensions", (None, "5"))]
    response = clip_service.post(path, files=parts)
    refusal(response, 400, "validation", "field", "`dimensions` is given twice")
    response = clip_service.post(f"{path}/batch?dimensions=5", files=parts[:1])
    assert np.allclose(response.json()["embeddings"], [[whole[:5]]], atol=1e-5)
    fields = {"image": text(data), "dimensions": 33}
    refusal(clip_service.post(path, fields), 400, "validation", "1 to 32")
    bad = clip_service.post(f"{path}?dimension=5", **raw)
    refusal(bad, 400, "validation", "query parameter", "`dimension`")
    bad = clip_service.post(path, files={"x": ("x", data)}, data={"size": "5"})
    refusal(bad, 400, "validation", "field", "`size`")
    fields = {"image": text(data), "model": "gpt"}
    refusal(clip_service.post(path, fields), 404, "model_not_found", "tiny-clip")


def test_vectors_over_http_are_sentence_transformers_own(
    clip_service: Server, clip_transformer: Any
) -> None:
    """Pictures of all kinds and texts of all lengths, alone and together with others."""
    files = sample_pictures()
    expected = clip_transformer.encode([Image.open(io.BytesIO(data)) for data in files])
    with ThreadPoolExecutor(8) as pool:
        alone = np.array(list(pool.map(lambda data: see(clip_service, data), files)))
    assert np.diag(cosines(alone, expected)).min() >= PARITY_FLOOR["fp32"]
    texts = ["a", "a red square", "A PICTURE of a solid blue color", "naïve 機械 🚀" * 3, "x " * 60]
    texts += ["a red <|endoftext|> square", "<|endoftext|>"]
    expected = clip_transformer.encode(texts)
    together = clip_service.post("/embeddings/batch", {"texts": texts}).json()["embeddings"]
    vectors = [vector for (vector,) in together]
    single = [clip_service.embed(each) for each in texts]
    assert np.diag(cosines(vectors, expected)).min() >= PARITY_FLOOR["fp32"]
    assert np.diag(cosines(single, expected)).min() >= PARITY_FLOOR["fp32"]


def test_a_long_text_is_chunked_at_the_window_of_77(
    clip_service: Server, clip_transformer: Any
) -> None:
    words = ["red", "blue", "square", "circle"] * 30  # 120 tokens: two chunks of 60
    expected = clip_transformer.encode([" ".join(words[:60]), " ".join(words[60:])]).mean(axis=0)
    assert cosines(clip_service.embed(" ".join(words)), expected) >= 0.9999


def test_texts_and_pictures_share_one_space(clip_service: Server) -> None:
    red, blue = see(clip_service, shape("red")), see(clip_service, shape("blue"))
    texts = [clip_service.embed(f"a solid {color} color") for color in ("red", "blue")]
    table = cosines(texts, [red, blue])
    print("cross-modal cosines, tiny model:", table.round(3).tolist())
    assert table[0, 0] > table[0, 1] + 0.2 and table[1, 1] > table[1, 0] + 0.2


def test_the_right_caption_ranks_first(clip_service: Server) -> None:
    """Over 100 pictures that were not trained with, among the captions of all 32 kinds."""
    captions = [tiny_clip.caption(*kind) for kind in tiny_clip.KINDS]
    known = [clip_service.embed(caption) for caption in captions]
    chance = random.Random(2026)
    kinds = [number % len(tiny_clip.KINDS) for number in range(100)]
    pictures = [encoded(tiny_clip.picture(*tiny_clip.KINDS[kind], chance)) for kind in kinds]
    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(lambda data: see(clip_service, data), pictures))
    first = cosines(seen, known).argmax(axis=1)
    right = (first == kinds).mean()
    print("right caption first:", right)
    assert right >= 0.9


def test_ready_says_that_pictures_are_supported(clip_service: Server, service: Server) -> None:
    assert clip_service.client.get("/health/ready").json()["supports_images"] is True
    assert service.client.get("/health/ready").json()["supports_images"] is False


@pytest.mark.parametrize("path", ["/embeddings/image", "/embeddings/image/batch"])
def test_a_text_only_model_says_how_to_get_one_for_pictures(service: Server, path: str) -> None:
    for body in ({"image": text(shape("red"))}, {"images": [text(shape("red"))]}, {"x": 1}):
        response = service.post(path, body)
        refusal(response, 501, "not_supported", "texts only", "make run MODEL=clip-ViT-B-32")
        assert response.headers["x-should-retry"] == "false"
    headers = {"Content-Type": "image/png"}
    refusal(service.post(path, content=b"x", headers=headers), 501, "not_supported")
    assert service.embed("a text")


# Bad input


def chunk(kind: bytes, data: bytes) -> bytes:
    return (
        struct.pack(">I", len(data))
        + kind
        + data
        + struct.pack(">I", zlib.crc32(kind + data) & 0xFFFFFFFF)
    )


def png_that_says(width: int, height: int) -> bytes:
    """A small PNG file whose header declares any size; its one row of pixels is real."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 3000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def wrong_crc(data: bytes) -> bytes:
    """The PNG with the checksum of its pixels spoilt, and nothing else."""
    at = data.index(b"IDAT")
    end = at + 4 + struct.unpack(">I", data[at - 4 : at])[0]
    return data[:end] + bytes([data[end] ^ 1]) + data[end + 1 :]


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect/></svg>'
JPEG = encoded(tiny_clip.picture("red", "circle", random.Random(3)), "JPEG")
PNG = shape("red")
RED = Image.new("RGB", (9, 9), "red")
AVIF = encoded(RED.resize((96, 96)), "AVIF")


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ("not base64!", ["not valid base64"]),
        ("naïve", ["not valid base64"]),
        ("AAAAA", ["not valid base64"]),
        (f"{text(PNG[:99])}={text(PNG)}", ["not valid base64"]),
        (
            text(b"just some text, in base64"),
            ["not a picture", "JPEG, PNG, WebP, AVIF, GIF, BMP or"],
        ),
        ("", ["empty"]),
        (" \n", ["empty"]),
        ("data:image/png;base64,", ["empty"]),
        ("data:image/png,abc", ["not a picture"]),
        ("data:image/png;base64", ["data URI has a comma"]),
        ("data:image/png,", ["empty"]),
        ("data:image/png;base64,%", ["not valid base64"]),
        ("data:image/svg+xml;utf8," + SVG.decode(), ["this is an SVG"]),
        ("data:image/png," + "%41" * 1_000_001, ["1000000 percent-encoded bytes", "base64"]),
        ("data:image/svg+xml;base64," + text(SVG), ["this is an SVG"]),
        ("https://example.com/cat.png", ["URL", "fetches nothing"]),
        ("file:///etc/passwd", ["URL", "fetches nothing"]),
        ("/etc/passwd", ["not a picture"]),  # nor a path
        (text(JPEG[: len(JPEG) // 2]), ["cannot be decoded", "truncated"]),
        (text(JPEG[:30]), ["picture"]),
        (text(PNG[: len(PNG) // 2]), ["cannot be decoded"]),
        (text(PNG[:20]), ["picture"]),
        (text(wrong_crc(PNG)), ["cannot be decoded", "broken PNG"]),
        (text(b"<?xml version='1.0'?>" + SVG), ["this is an SVG"]),
        (text(b"%PDF-1.7\n" + bytes(900)), ["this is a PDF"]),
        (text(b"\xef\xbb\xbf\n<!DOCTYPE html><html></html>"), ["this is an HTML page"]),
        (text(b"\0\0\0\x1cftypheic" + bytes(99)), ["this is HEIC"]),
        (text(b"\0\0\0\x1cftypavif" + bytes(99)), ["picture"]),
        (text(AVIF[: len(AVIF) // 2]), ["picture"]),
        (text(says(AVIF, (8, 8))), ["AVIF of 8 x 8 pixels with frames of 96 x 96"]),
        (
            text(encoded(Image.new("RGB", (9, 9)), "AVIF", save_all=True, append_images=[RED])),
            ["animated AVIF is not taken"],
        ),
        (text(b"\0\0\1\0\1\0" + bytes(99)), ["ICO"]),
        (text(b"8BPS" + bytes(99)), ["Photoshop"]),
        (text(encoded(Image.new("F", (9, 9)), "TIFF")), ["32-bit images"]),
        (text(b"\xff\xd8\xff\xe0" + bytes(999)), ["picture"]),
        (text(b"RIFF\x10\0\0\0WEBPVP8X" + bytes(99)), ["picture"]),
        (text(b"GIF89a" + bytes(99)), ["picture"]),
        (text(b"BM" + bytes(99)), ["picture"]),
        (text(b"II*\0" + bytes(99)), ["picture"]),
    ],
    ids=lambda value: ascii(value[:24]) if isinstance(value, str) else "",
)
def test_what_is_not_a_picture_is_refused_by_name(
    clip_service: Server, image: str, parts: list[str]
) -> None:
    refusal(clip_service.post("/embeddings/image", {"image": image}), 400, "validation", "$.image")
    images = [text(PNG), text(JPEG), image, text(PNG)]
    response = clip_service.post("/embeddings/image/batch", {"images": images})
    refusal(response, 400, "validation", "$.images[2]: ", *parts)


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ({}, ["image"]),
        ({"image": None}, ["$.image", "null"]),
        ({"image": ["a"]}, ["$.image", "array"]),
        ({"images": []}, ["unknown field", "`images` is what /embeddings/image/batch takes"]),
        ({"image": "a", "text": "b"}, ["unknown field", "`text` is what /embeddings takes"]),
        ({"input": "a"}, ["unknown field", "`input` is what /v1/embeddings takes"]),
        ({"image": "a", "prompt_name": "query"}, ["unknown field", "prompt_name"]),
    ],
    ids=ascii,
)
def test_a_bad_body_is_refused(clip_service: Server, body: Any, parts: list[str]) -> None:
    refusal(clip_service.post("/embeddings/image", body), 400, "validation", *parts)


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)])
def test_the_smallest_and_the_longest_picture_are_embedded(
    clip_service: Server, size: tuple[int, int]
) -> None:
    before = memory(clip_service)
    assert see(clip_service, encoded(Image.new("RGB", size, "red"))).shape == (32,)
    assert memory(clip_service) - before < 20e6


@pytest.mark.parametrize(
    "bomb",
    [
        png_that_says(20_000, 20_000),
        png_that_says(1_000_000, 1_000_000),
        encoded(Image.new("1", (9_000, 9_000)), "PNG"),
        encoded(Image.new("1", (9_000, 9_000)), "TIFF", compression="group4"),
        encoded(Image.new("P", (9_000, 9_000)), "GIF"),
        b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, 20_000, 20_000, 1, 24, *[0] * 6),
        says(AVIF, (9_000, 6_000)),
        b"RIFF\x26\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xfe\x3f\0" * 2 + b"VP8 \0\0\0\0",
    ],
    ids=["PNG", "huge PNG", "real PNG", "TIFF", "GIF", "BMP", "AVIF", "WebP"],
)
def test_a_bomb_is_refused_from_its_header(clip_service: Server, bomb: bytes) -> None:
    """81 to 400 million pixels, 243 MB and more: memory does not move."""
    see(clip_service, PNG)
    assert len(bomb) < 500_000
    before = memory(clip_service)
    response = clip_service.post("/embeddings/image", {"image": text(bomb)})
    assert response.status_code in (400, 413)
    if not bomb.startswith(b"RIFF"):  # libwebp wants to see pixels before it believes this header
        refusal(response, 413, "too_large", "$.image", "50000000", "MAX_IMAGE_PIXELS")
    images = [text(PNG), text(bomb)]
    response = clip_service.post("/embeddings/image/batch", {"images": images})
    assert "$.images[1]" in response.json()["error"]
    assert memory(clip_service) - before < 20e6


def test_a_picture_of_many_pixels_holds_nobody_up(clip_service: Server) -> None:
    """By a path, too, that is not recognised before it is decoded (api/routes.py)."""
    data = encoded(Image.new("1", (7000, 7100)), "TIFF", compression="group4")
    assert len(data) < 3000
    for path in ("/embeddings/image", "/embeddings/%69mage"):
        with clip_service.http() as sock:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\n"
            head += f"Content-Type: image/tiff\r\nContent-Length: {len(data)}\r\n\r\n"
            sock.sendall(head.encode() + data)
            assert clip_service.client.get("/health").status_code == 200
            assert select.select([sock], [], [], 0)[0] == []  # the answer is still to come
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_an_animation_of_1000_frames_costs_one(clip_service: Server) -> None:
    frames = [Image.new("P", (200, 200), number % 256) for number in range(1000)]
    first = Image.new("RGB", (200, 200), "red").convert("P")
    data = encoded(first, "GIF", save_all=True, append_images=frames)
    assert np.allclose(see(clip_service, data), see(clip_service, encoded(first.convert("RGB"))))


def of_size(size: int) -> bytes:
    """A PNG of just so many bytes."""
    plain = encoded(Image.new("RGB", (9, 9)))
    filler = bytes(size - len(plain) - 12)
    return plain[:-12] + chunk(b"prIv", filler) + plain[-12:]


def test_the_limits_are_exact(small: Server) -> None:
    path = "/embeddings/image"
    assert see(small, of_size(5000)).shape == (32,)
    response = small.post(path, {"image": text(of_size(5001))})
    refusal(response, 413, "too_large", "$.image", "5001", "5000", "MAX_IMAGE_SIZE")
    headers = {"Content-Type": "image/png"}
    assert small.post(path, content=of_size(5000), headers=headers).status_code == 200
    response = small.post(path, content=of_size(5001), headers=headers)
    refusal(response, 413, "too_large", "MAX_IMAGE_SIZE")
    response = small.post(path, content=of_size(60_001), headers=headers)
    refusal(response, 413, "too_large", "60000", "MAX_BODY_SIZE")
    assert see(small, encoded(Image.new("L", (120, 100)))).shape == (32,)
    frames = encoded(Image.new("L", (120, 101)), "AVIF")
    for data in (encoded(Image.new("L", (120, 101))), frames, says(frames, (100, 100))):
        response = small.post(path, {"image": text(data)})
        refusal(response, 413, "too_large", "120 x 101", "12000", "MAX_IMAGE_PIXELS")


def test_too_many_pictures(clip_service: Server, small: Server) -> None:
    for server, most in ((clip_service, 20), (small, 3)):
        path, data = "/embeddings/image/batch", encoded(Image.new("RGB", (9, 9)))
        parts = ("files", ("x.png", data))
        assert server.post(path, {"images": [text(data)] * most}).status_code == 200
        assert server.post(path, files=[parts] * most).status_code == 200
        for response in (
            server.post(path, {"images": [text(data)] * (most + 1)}),
            server.post(path, files=[parts] * (most + 1)),
        ):
            refusal(response, 400, "validation", str(most + 1), str(most), "MAX_IMAGES_PER_BATCH")
        refusal(server.post(path, {"images": []}), 400, "validation", "at least one")


def multipart(server: Server, body: bytes, kind: str) -> httpx.Response:
    headers = {"Content-Type": kind}
    return server.post("/embeddings/image", content=body, headers=headers)


def test_bad_multipart(clip_service: Server) -> None:
    form = "multipart/form-data; boundary=x"
    field = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    file = b'--x\r\nContent-Disposition: form-data; name="f"; filename="%s"\r\n\r\n%s\r\n'
    for body, kind, parts in (
        (b"--x--\r\n", form, ["no file"]),
        (b"", form, ["multipart"]),
        (b"anything", form, ["multipart"]),
        (b"anything", "multipart/form-data", ["no boundary"]),
        (field % (b"image", b"abc") + b"--x--\r\n", form, ["field", "`image`"]),
        (field % (b"model", b"tiny-clip") + b"--x--\r\n", form, ["no file"]),
        (file % (b"a", PNG) + file % (b"b", PNG) + b"--x--\r\n", form, ["2 files", "one"]),
        (file % (b"a", b"") + b"--x--\r\n", form, ["$.image", "empty"]),
        (file % (b"a", SVG) + b"--x--\r\n", form, ["$.image", "SVG"]),
        (file % (b"a", PNG), form, ["multipart"]),
    ):
        refusal(multipart(clip_service, body, kind), 400, "validation", *parts)
    response = multipart(clip_service, field % (b"f", b"a" * 300_000) + b"--x--\r\n", form)
    refusal(response, 413, "too_large", "262144", "as a file")
    response = multipart(clip_service, file % (b"f", b"a") * 1001 + b"--x--\r\n", form)
    refusal(response, 413, "too_large", "1000")


@pytest.mark.parametrize("path", ["/embeddings/image", "/embeddings/image/batch"])
def test_other_content_types_are_refused(clip_service: Server, path: str) -> None:
    for kind in ("image/svg+xml", "text/plain", "application/octet-stream", "application/pdf"):
        response = clip_service.post(path, content=SVG, headers={"Content-Type": kind})
        refusal(response, 415, "unsupported_media_type", kind)
    response = clip_service.post(path, content=b"", headers={"Content-Type": "image/png"})
    refusal(response, 400, "validation", "empty")


def test_random_damage_is_the_callers_fault_and_memory_stays(clip_service: Server) -> None:
    """Mutations of good files in every format: a vector or a 4xx, never a 5xx."""
    chance = np.random.default_rng(7)
    picture = tiny_clip.picture("blue", "triangle", random.Random(5))
    kinds = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
    files = [encoded(picture, kind) for kind in kinds] + [
        encoded(picture, "JPEG", progressive=True)
    ]
    files.append(encoded(picture, "TIFF", compression="tiff_lzw"))
    before = memory(clip_service)
    bodies = []
    for number in range(400):
        data = bytearray(files[number % len(files)])
        for _ in range(chance.integers(1, 5)):
            at = int(chance.integers(0, min(len(data), 300 if number % 2 else len(data))))
            data[at : at + int(chance.integers(0, 3))] = chance.bytes(int(chance.integers(0, 3)))
        bodies.append(bytes(data))
    with ThreadPoolExecutor(4) as pool:
        headers = {"Content-Type": "image/png"}
        answers = pool.map(
            lambda data: clip_service.post("/embeddings/image", content=data, headers=headers),
            bodies,
        )
        statuses = [answer.status_code for answer in answers]
    assert set(statuses) <= {200, 400, 413} and 200 in statuses and 400 in statuses
    assert memory(clip_service) - before < 100e6


def test_memory_after_800_pictures_is_that_after_200(clip_models_dir: pathlib.Path) -> None:
    """Of mixed sizes and formats, four at a time."""
    chance = np.random.default_rng(3)
    files = []
    for number in range(40):
        width, height = (int(side) for side in chance.integers(16, 450, 2))
        pixels = chance.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3)).astype(np.uint8)
        image = Image.fromarray(pixels).resize((width, height))
        files.append(encoded(image, ("JPEG", "PNG", "WEBP", "BMP")[number % 4]))
    headers = {"Content-Type": "image/png"}
    with serve(clip_models_dir, PRECISION="fp32") as server, ThreadPoolExecutor(4) as pool:

        def send(count: int) -> None:
            for answer in pool.map(
                lambda data: server.post("/embeddings/image", content=data, headers=headers),
                [files[number % len(files)] for number in range(count)],
            ):
                assert answer.status_code == 200

        # A second after it is ready the service prepares for lone texts, with 7 MB.
        time.sleep(2 * WIDEN_AFTER)
        send(200)
        after_200 = _status(server, "VmRSS")
        send(600)
        after_800 = _status(server, "VmRSS")
    print(f"memory after 200 pictures {after_200 / 1e6:.1f} MB, after 800 {after_800 / 1e6:.1f}")
    assert after_800 <= 1.05 * after_200
