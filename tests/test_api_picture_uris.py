"""Pictures in JSON strings: every way in which clients write them, and pictures among texts."""

import base64
import urllib.parse
from typing import Any

import numpy as np
import pytest
from servers import Server
from test_api_images import refusal, see, shape, text

PNG = shape("red")


def in_other_letters(data: bytes) -> dict[str, str]:
    """Ways to write a picture in JSON that clients use."""
    plain, quote = text(data), urllib.parse.quote
    safe = base64.urlsafe_b64encode(data).decode()
    assert "-" in safe and "_" in safe and plain.endswith("=")
    uri = f"data:image/png;base64,{plain}"
    return {
        "url-safe": safe,
        "url-safe, no padding": safe.rstrip("="),
        "no padding": plain.rstrip("="),
        "percent-encoded base64": quote(plain, safe=""),
        "percent-encoded base64 in a URI": f"data:image/png;base64,{quote(plain, safe='')}",
        "percent-encoded bytes": f"data:image/png,{quote(data)}",
        "lower-case escapes": "data:image/png," + "".join(f"%{byte:02x}" for byte in data),
        "percent-encoded URI": quote(uri, safe=""),
        "leading blank": f" {uri}",
        "leading lines": f"\n\t\r\n {uri}",
        "leading blank before base64": f"\n  {plain}",
        "trailing line": f"{uri}\n",
        "lines": uri.replace(",", ",\r\n") + "\r\n",
        "wrapped": "data:image/png;base64,\n" + base64.encodebytes(data).decode(),
        "indented": "\n    ".join(base64.encodebytes(data).decode().splitlines()),
        "wrapped, url-safe, no padding": "\n".join([safe[:50], safe[50:].rstrip("="), ""]),
        "capitals": uri.replace("data:image/png;base64", "DATA:IMAGE/PNG;BASE64"),
        "parameters": uri.replace(";base64", ";name=a.png; base64"),
        "no type": uri.replace("image/png", ""),
    }


def test_base64_and_data_uris_as_clients_write_them(clip_service: Server) -> None:
    seeds = (shape("blue", "circle", seed) for seed in range(99))
    data = next(
        data
        for data in seeds
        if text(data).endswith("=") and "+" in text(data) and "/" in text(data)
    )
    ways, expected = in_other_letters(data), see(clip_service, data).tolist()
    for way, image in ways.items():
        response = clip_service.post("/embeddings/image", {"image": image})
        assert response.status_code == 200, (way, response.text)
        assert np.allclose(response.json()["embeddings"], [expected], atol=1e-5), way
    images = list(ways.values())[:20]
    batch = clip_service.post("/embeddings/image/batch", {"images": images}).json()["embeddings"]
    assert np.allclose(batch, [[expected]] * len(images), atol=1e-5)


# Pictures among texts


def test_openais_route_takes_data_uris_for_pictures(clip_service: Server) -> None:
    data = shape("blue", "circle")
    uri, expected = f"data:image/png;base64,{text(data)}", see(clip_service, data).tolist()
    wrapped = "data:image/png;base64,\n" + base64.encodebytes(data).decode()
    ways = [uri, f"\n {uri}", wrapped, uri.replace("data:image", "Data:Image")]
    ways += ["data:image/png," + urllib.parse.quote(data), uri.replace("png", "x;name=a b.png")]
    for sent in ways:
        for more in ({}, {"modality": None}, {"modality": "image"}):
            response = clip_service.post("/v1/embeddings", {"input": [sent], **more})
            assert response.status_code == 200, response.text
            vector = response.json()["data"][0]["embedding"]
            assert np.allclose(vector, expected, atol=1e-5)
    response = clip_service.post("/v1/embeddings", {"input": ways})
    vectors = [entry["embedding"] for entry in response.json()["data"]]
    assert np.allclose(vectors, [expected] * len(ways), atol=1e-5)


@pytest.mark.parametrize(
    "sent",
    [
        "data:image/png;base64, is how a picture's URI begins",
        "data:image/png;base64,iVBORw0KGgo= and more",
        "see data:image/png;base64,iVBORw0KGgo=",
        "data:text/plain;base64,aGVsbG8=",
        "data: image/png, and other kinds",
        "data:image/png",
    ],
)
def test_prose_about_data_uris_is_a_text(clip_service: Server, sent: str) -> None:
    response = clip_service.post("/v1/embeddings", {"input": sent, "modality": "text"})
    assert response.status_code == 200
    expected = response.json()["data"][0]["embedding"]
    answer = clip_service.post("/v1/embeddings", {"input": sent}).json()
    assert np.allclose(answer["data"][0]["embedding"], expected, atol=1e-5)
    assert np.allclose(clip_service.embed(sent), expected, atol=1e-5)


def test_texts_and_pictures_do_not_mix(clip_service: Server) -> None:
    uri = f"data:image/png;base64,{text(PNG)}"
    for sent, index in ((["a", uri], 1), ([uri, uri, "a"], 2)):
        response = clip_service.post("/v1/embeddings", {"input": sent})
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == "input" and error["message"].startswith(f"$.input[{index}]: ")
        assert "texts and pictures are mixed" in error["message"]
    as_text = clip_service.post("/v1/embeddings", {"input": ["a", uri], "modality": "text"})
    assert as_text.status_code == 200
    response = clip_service.post("/v1/embeddings", {"input": [uri, "data:image/png;base64,!"]})
    assert response.json()["error"]["message"].startswith("$.input[1]: not valid base64")


PICTURE_TEXT = f" data:image/jpeg;base64,{text(PNG)}"


@pytest.mark.parametrize(
    "path, body, place",
    [
        ("/embeddings", {"text": PICTURE_TEXT}, "$.text: "),
        ("/embeddings/batch", {"texts": ["a", PICTURE_TEXT]}, "$.texts[1]: "),
        ("/embed", {"text": PICTURE_TEXT}, "$.text: "),
        ("/embed", {"inputs": PICTURE_TEXT}, "$.inputs: "),
        ("/embed", {"inputs": ["a", "b", PICTURE_TEXT]}, "$.inputs[2]: "),
        ("/", {"inputs": [PICTURE_TEXT]}, "$.inputs[0]: "),
        (
            "/similarity",
            {"inputs": {"source_sentence": "a", "sentences": ["b", PICTURE_TEXT]}},
            "$.inputs.sentences[1]: ",
        ),
        (
            "/",
            {"inputs": {"source_sentence": PICTURE_TEXT, "sentences": ["b"]}},
            "$.inputs.source_sentence: ",
        ),
    ],
)
def test_other_routes_say_where_pictures_go(
    clip_service: Server, service: Server, path: str, body: Any, place: str
) -> None:
    response = clip_service.post(path, body)
    refusal(response, 400, "validation", place, "/embeddings/image", "/v1/embeddings")
    refusal(service.post(path, body), 501, "not_supported", "takes texts only")


def test_a_model_of_texts_takes_no_data_uri_for_a_text(service: Server) -> None:
    response = service.post("/v1/embeddings", {"input": [PICTURE_TEXT]})
    assert response.status_code == 501 and "takes texts only" in response.text
    response = service.post("/v1/embeddings", {"input": PICTURE_TEXT, "modality": "text"})
    assert response.status_code == 200
