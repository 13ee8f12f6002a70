"""Fields and options that a dialect does not know, that are null, or that stand in two places."""

import json
import re
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import NAME, WIDE
from servers import Server
from test_api_metrics import labelled, scrape, scrape_until

from api.schemas import INPUTS

PAIR = {"source_sentence": "A cat sleeps.", "sentences": ["A kitten naps.", "Taxes are due."]}
NATIVE = {"/embeddings": {"text": "a"}, "/embeddings/batch": {"texts": ["a"]}}
LENIENT: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": "a"},
    "/embed": {"inputs": "a"},
    "/": {"inputs": ["a"]},
    "/similarity": {"inputs": PAIR},
    "/tokenize": {"inputs": "a"},
}
PLAIN = ("/embed", {"text": "a"})
HEADER = "X-Ignored-Fields"


def refused(response: httpx.Response, *parts: str) -> None:
    assert response.status_code == 400, response.text
    assert HEADER not in response.headers
    message = response.json()["error"]
    message = message if isinstance(message, str) else message["message"]
    assert all(part in message for part in parts), message


def same(one: Any, two: Any) -> bool:
    """Whether two JSON values are equal, numbers nearly: batches are not computed bit for bit."""
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(same(one[name], two[name]) for name in one)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two or isinstance(one, float) and abs(one - two) < 1e-4)


# Unknown fields


@pytest.mark.parametrize("path", LENIENT)
@pytest.mark.parametrize(
    "more, named",
    [
        ({"drop_params": True}, "drop_params"),
        ({"drop_params": {"deep": [1, {"x": None}]}, "input_type": "query"}, None),
        ({"metadata": ["a"] * 1000}, "metadata"),
        ({"texts": ["a"]}, "texts"),
        ({"nothing": None}, ""),
    ],
    ids=lambda value: str(value)[:20],
)
def test_other_servers_dialects_ignore_what_they_do_not_know_and_say_so(
    service: Server, path: str, more: dict[str, Any], named: str | None
) -> None:
    plain = service.post(path, LENIENT[path])
    response = service.post(path, LENIENT[path] | more)
    assert response.status_code == 200 and same(response.json(), plain.json())
    expected = ", ".join(more) if named is None else named
    assert response.headers.get(HEADER, "") == expected and HEADER not in plain.headers


def test_nested_fields_are_named_with_their_path(service: Server) -> None:
    body = {
        "inputs": PAIR | {"weights": [1, 2]},
        "parameters": {"foo": 1, "bar": None, "truncate": None},
        "options": {"wait_for_model": True, "tier": "gold"},
    }
    for path in ("/", "/similarity"):
        response = service.post(path, body)
        assert response.status_code == 200, response.text
        assert response.headers[HEADER] == "inputs.weights, parameters.foo, options.tier"


@pytest.mark.parametrize(
    "name, shown",
    [
        ("a\r\nSet-Cookie: x=1", "a??Set-Cookie:?x=1"),
        ("größe 😀", "gr??e??"),
        ("a,b", "a?b"),
        ("", "?"),
        ("\0\x7f\x1b[31m", "???[31m"),
        ("x" * 100_000, "x" * 64),
        ("\u2028", "?"),
    ],
    ids=ascii,
)
def test_a_name_cannot_harm_the_header(service: Server, name: str, shown: str) -> None:
    response = service.post("/v1/embeddings", {"input": "a", name: 1})
    assert response.status_code == 200 and response.headers[HEADER] == shown[:64]
    assert "set-cookie" not in response.headers


def test_thousands_of_names_are_counted(service: Server) -> None:
    response = service.post("/embed", {"inputs": "a"} | {f"f{at}": at for at in range(5000)})
    names = response.headers[HEADER].split(", ")
    assert names == [*(f"f{at}" for at in range(16)), "(4984 more)"]


def test_a_body_of_very_many_fields_is_not_searched(service: Server) -> None:
    body = b'{"inputs": "a", %s}' % b",".join(b'"%d":1' % at for at in range(200_000))
    response = service.post("/embed", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 200 and response.headers[HEADER] == "(unnamed)"


@pytest.mark.parametrize("path", LENIENT)
def test_what_is_known_there_and_has_no_effect_here_is_not_called_ignored(
    service: Server, path: str
) -> None:
    options: Any = {"wait_for_model": True, "use_cache": False, "use_gpu": None}
    more = {"user": "me"} if path.startswith("/v1") else {"options": options}
    response = service.post(path, LENIENT[path] | more)
    assert response.status_code == 200 and HEADER not in response.headers


@pytest.mark.parametrize(
    "path, more, says",
    [
        ("/v1/embeddings", {"dimensions": "8", "x": 1}, "$.dimensions"),
        ("/v1/embeddings", {"x": 1, "user": 3}, "$.user"),
        ("/v1/embeddings", {"x": 1, "input": ["a", None]}, "$.input[1]"),
        ("/embed", {"x": 1, "parameters": {"y": 1, "truncate": "yes"}}, "$.parameters.truncate"),
        ("/embed", {"parameters": []}, "$.parameters"),
        ("/embed", {"x": 1, "options": {"use_cache": "no"}}, "$.options.use_cache"),
        ("/similarity", {"x": 1, "inputs": {"sentences": ["a"]}}, "source_sentence"),
        ("/tokenize", {"x": 1, "add_special_tokens": 1}, "$.add_special_tokens"),
        ("/", {"x": 1, "dimensions": 0}, "dimensions is 0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_value_of_a_known_field_is_refused_with_its_place(
    service: Server, path: str, more: dict[str, Any], says: str
) -> None:
    response = service.post(path, LENIENT[path] | more)
    assert response.status_code == 400 and says in response.text, response.text


@pytest.mark.parametrize(
    "tail",
    [
        b'"x": "\xff"',
        b'"x": %s' % (b"[" * 10_000 + b"]" * 10_000),
        b'"\\ud800": 1',
        b'"\xff": 1',
        b'"x": 01',
        b'"x": 1,',
        b'"x": nul',
    ],
    ids=lambda tail: ascii(tail[:20]),
)
def test_a_broken_unknown_field_is_the_callers_fault(service: Server, tail: bytes) -> None:
    body = b'{"input": "a", %s}' % tail
    headers = {"Content-Type": "application/json"}
    response = service.post("/v1/embeddings", content=body, headers=headers)
    assert response.status_code == (200 if tail == b'"x": "\xff"' else 400), response.text
    assert "Traceback" not in service.log


@pytest.mark.parametrize("path, body", [*NATIVE.items(), PLAIN])
@pytest.mark.parametrize("name", ["drop_params", "normalize", "prompt", "Dimensions", "parameters"])
def test_native_routes_refuse_them(service: Server, path: str, body: Any, name: str) -> None:
    for value in (1, None, {"x": 1}):
        refused(service.post(path, body | {name: value}), f"unknown field `{name}`")


@pytest.mark.parametrize("path", [*NATIVE, *LENIENT])
@pytest.mark.parametrize("name", INPUTS)
def test_inputs_at_the_wrong_route_are_told_the_right_one(
    service: Server, path: str, name: str
) -> None:
    own = {**NATIVE, **LENIENT}[path]
    if name in own or (path, name) == PLAIN[:1] + ("text",):
        return
    value = ["a"] if name.endswith("s") else "a"
    refused(service.post(path, {name: value}), f"`{name}` is what {INPUTS[name]} takes")
    if path in NATIVE:
        both = service.post(path, own | {name: value})
        refused(both, "unknown field", f"`{name}` is what {INPUTS[name]} takes")


def test_the_route_that_is_told_takes_it(service: Server) -> None:
    document = service.client.get("/openapi.json").json()
    for name, path in INPUTS.items():
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        schemas = re.findall(r"schemas/(\w+)", json.dumps(body))
        known = [document["components"]["schemas"][schema]["properties"] for schema in schemas]
        assert any(name in properties for properties in known), name


def test_ignored_fields_are_counted_by_route_and_logged(service: Server) -> None:
    counted = labelled("requests_with_ignored_fields_total", route="/v1/embeddings")
    before = scrape(service).get(counted, 0.0)
    service.post("/v1/embeddings", {"input": "a"})
    body = {"input": "a", "odd\nname": 1, "other": 2}
    response = service.post("/v1/embeddings", body, headers={"X-Request-Id": "has-odd-fields"})
    assert response.headers[HEADER] == "odd?name, other"
    now = scrape_until(service, lambda now: now.get(counted, 0.0) > before)
    assert now[counted] == before + 1
    assert not [name for name in now if "odd" in str(name)]
    (line,) = [line for line in service.log.splitlines() if "has-odd-fields" in line]
    assert " ignored odd?name, other " in line


# Null


@pytest.mark.parametrize("path", [*NATIVE, *LENIENT])
def test_null_is_absent_in_every_optional_field(service: Server, path: str) -> None:
    """All that /openapi.json lists, one by one and together, in nested objects too."""
    document = service.client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    body: dict[str, Any] = {**NATIVE, **LENIENT}[path]
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    optional = {
        name: re.findall(r"schemas/(\w+)", json.dumps(schema))
        for kind in re.findall(r"schemas/(\w+)", json.dumps(content))
        if body.keys() <= schemas[kind]["properties"].keys()
        for name, schema in schemas[kind]["properties"].items()
        if name not in schemas[kind]["required"]
    }
    assert "model" in optional
    nulls: list[dict[str, Any]] = [{name: None} for name in optional]
    for name, kinds in optional.items():
        for kind in kinds:
            nulls += [{name: {inner: None}} for inner in schemas[kind]["properties"]]
            nulls.append({name: dict.fromkeys(schemas[kind]["properties"])})
    expected = service.post(path, body).json()
    for more in [*nulls, dict.fromkeys(optional)]:
        response = service.post(path, body | more)
        assert response.status_code == 200 and same(response.json(), expected), more
        assert HEADER not in response.headers


def test_null_does_not_choose_the_plain_form(service: Server) -> None:
    response = service.post("/embed", {"inputs": "a", "text": None})
    assert response.status_code == 200 and len(response.json()) == 1
    refused(service.post("/embed", {"inputs": "a", "text": "b"}), "`inputs` or `text`, not both")


# Options in `parameters`


OPTIONS = [
    {"normalize": False},
    {"truncate": True, "truncation_direction": "Left"},
    {"dimensions": 8},
    {"prompt_name": "query", "dimensions": 3, "normalize": True},
    {"model": WIDE},
]


@pytest.mark.parametrize("path", ["/embed", "/"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_mean_the_same_in_parameters(
    service: Server, path: str, options: dict[str, Any]
) -> None:
    body = {"inputs": "the river rose " * 90}
    at_top = service.post(path, body | options)
    assert at_top.status_code == 200, at_top.text
    for wrapped in (
        {"parameters": options},
        {"parameters": options, "options": {"wait_for_model": True}},
        {"parameters": options, **options},
        {"parameters": {}, **options},
        {"parameters": options, **dict.fromkeys(options)},
    ):
        response = service.post(path, body | wrapped)
        assert response.status_code == 200 and same(response.json(), at_top.json()), wrapped
        assert HEADER not in response.headers


def test_options_of_the_other_routes_in_parameters(service: Server) -> None:
    long = {"source_sentence": "the river rose " * 90, "sentences": ["a bridge"]}
    options = {"truncate": True, "truncation_direction": "left", "prompt_name": "query"}
    whole = service.post("/similarity", {"inputs": long}).json()
    cut = service.post("/similarity", {"inputs": long, "parameters": options}).json()
    at_top = service.post("/similarity", {"inputs": long} | options).json()
    assert same(cut, at_top) and not same(cut, whole)
    bare = {"inputs": "a b", "add_special_tokens": False}
    wrapped = {"inputs": "a b", "parameters": {"add_special_tokens": False}}
    assert service.post("/tokenize", wrapped).json() == service.post("/tokenize", bare).json()


def test_every_released_form_of_a_similarity(service: Server) -> None:
    """huggingface_hub 0.28 to 0.30 sends the sentences beside `inputs`, which is null."""
    expected = service.post("/similarity", {"inputs": PAIR}).json()
    for path in ("/", "/similarity"):
        for body in (
            {"inputs": PAIR, "parameters": {}},
            {"inputs": None, "parameters": {}, **PAIR},
            {**PAIR, "parameters": {"truncate": True}, "options": {"use_cache": True}},
            {**PAIR, "truncate": None},
        ):
            response = service.post(path, body)
            assert response.status_code == 200 and same(response.json(), expected), body
            assert HEADER not in response.headers
        flat = service.post(path, PAIR | {"sentences": ["a", ""]})
        refused(flat, "$.sentences[1]: text is empty")
        refused(service.post(path, {"source_sentence": "a"}), "required field `sentences`")
        both = service.post(path, {"inputs": PAIR, "source_sentence": "a"})
        assert both.status_code == 200 and both.headers[HEADER] == "source_sentence"


@pytest.mark.parametrize(
    "top, inner",
    [
        ({"truncate": False}, {"truncate": True}),
        ({"normalize": True}, {"normalize": False}),
        ({"dimensions": 8}, {"dimensions": 9}),
        ({"prompt_name": "query"}, {"prompt_name": "document"}),
        ({"model": NAME}, {"model": WIDE}),
    ],
    ids=str,
)
def test_two_values_for_one_option_are_refused(service: Server, top: Any, inner: Any) -> None:
    (name,) = top
    for path in ("/embed", "/"):
        response = service.post(path, {"inputs": "a", **top, "parameters": inner})
        refused(response, f"$.{name} ", f"$.parameters.{name} ", "differ")


# Options in the query


QUERIES = [
    ("dimensions=8", {"dimensions": 8}),
    ("model=" + WIDE, {"model": WIDE}),
    ("prompt_name=query&dimensions=5", {"prompt_name": "query", "dimensions": 5}),
    ("dimensions=%38&", {"dimensions": 8}),
    ("&&", {}),
    ("dimensions=null", {}),
]


@pytest.mark.parametrize("path", ["/embeddings", "/embeddings/batch", "/v1/embeddings", "/embed"])
@pytest.mark.parametrize("query, options", QUERIES, ids=lambda value: str(value))
def test_an_option_in_the_query_is_one_in_the_body(
    service: Server, path: str, query: str, options: dict[str, Any]
) -> None:
    body = {**NATIVE, **LENIENT}[path]
    expected = service.post(path, body | options)
    for sent in (body, body | options):
        response = service.post(f"{path}?{query}", sent)
        assert response.status_code == 200 and same(response.json(), expected.json())
        assert HEADER not in response.headers


def test_options_that_not_every_route_has(service: Server) -> None:
    chunks = service.post("/embeddings?chunks=true&encoding_format=base64", {"text": "a"}).json()
    assert chunks["chunks"] and isinstance(chunks["embeddings"][0], str)
    raw = service.post("/embed?normalize=false", {"inputs": "a"}).json()
    assert np.linalg.norm(raw) != pytest.approx(1, abs=0.01)
    (tokens,) = service.post("/tokenize?add_special_tokens=false", {"inputs": "a"}).json()
    assert len(tokens) == 1
    plain = service.post("/embed?dimensions=4", {"text": "a"}).json()
    assert len(plain) == 4
    long = {"inputs": {"source_sentence": "river " * 400, "sentences": ["a"]}}
    cut = service.post("/similarity?truncate=true", long).json()
    assert same(cut, service.post("/similarity", long | {"truncate": True}).json())


@pytest.mark.parametrize("path", [*NATIVE, *LENIENT])
def test_a_bad_query_is_refused(service: Server, path: str) -> None:
    body = {**NATIVE, **LENIENT}[path]
    unknown = service.post(f"{path}?model=nope", body)
    assert unknown.status_code == 404 and "nope" in unknown.text
    refused(service.post(f"{path}?model=a&model=a", body), "`model` is given twice")
    refused(service.post(f"{path}?model=a", body | {"model": "b"}), "$.model", "query", "differ")
    refused(service.post(f"{path}?{next(iter(body))}=a", body), f"`{next(iter(body))}`")
    if path not in ("/similarity", "/tokenize"):
        refused(service.post(f"{path}?dimensions=eight", body), "query parameter", "$.dimensions")
        refused(service.post(f"{path}?dimensions=0", body), "dimensions is 0")
        refused(service.post(f"{path}?dimensions=", body), "query parameter", "$.dimensions")
    odd = service.post(f"{path}?api-version=2024&a%0d%0a=1", body)
    if path in NATIVE:
        refused(odd, "query parameter", "unknown field `api-version`")
    else:
        assert odd.status_code == 200 and odd.headers[HEADER] == "api-version, a??"


def test_a_route_without_options_refuses_them(service: Server) -> None:
    for path, query in (
        ("/info", f"model={WIDE}"),
        ("/v1/models", "dimensions=8"),
        (f"/v1/models/{NAME}", "model=" + WIDE),
        ("/health/ready", "model=" + WIDE),
    ):
        response = service.client.get(f"{path}?{query}")
        refused(response, "query parameter", f"takes no `{query.partition('=')[0]}`")
        assert service.client.get(f"{path}?_=1").status_code == 200


def test_which_param_is_wrong_is_told_to_openais_clients(service: Server) -> None:
    for query in ("dimensions=x", "dimensions=1&dimensions=1", "dimensions=9"):
        response = service.post(f"/v1/embeddings?{query}", {"input": "a", "dimensions": 8})
        assert response.json()["error"]["param"] == "dimensions", response.text


def test_a_prompt_that_is_empty_is_listed_and_changes_nothing(service: Server) -> None:
    model = service.client.get(f"/v1/models/{NAME}").json()
    assert model["prompts"] == {"query": "", "document": ""} and model["default_prompt"] is None
    for name in model["prompts"]:
        assert same(service.embed("a", prompt_name=name), service.embed("a"))


# Options in the query


@pytest.mark.parametrize("path, name", [("/api/embed", "input"), ("/api/embeddings", "prompt")])
def test_an_input_that_may_be_absent_is_still_no_option(
    service: Server, path: str, name: str
) -> None:
    for body in ({}, {name: "a"}):
        refused(service.post(f"{path}?{name}=a", body), f"field `{name}` goes in the body")
    refused(service.post(f"{path}?options=1", {name: "a"}), "field `options` goes in the body")
    answer = service.post(f"{path}?keep_alive=5m&truncate=false&dimensions=8", {name: "a"})
    assert answer.status_code == 200 and HEADER not in answer.headers


def test_one_of_several_words_may_stand_in_a_query(service: Server) -> None:
    body = {"inputs": "the river rose " * 90, "truncate": True}
    left = service.post("/embed", body | {"truncation_direction": "left"}).json()
    assert same(service.post("/embed?truncation_direction=left", body).json(), left)
    assert not same(service.post("/embed", body).json(), left)
