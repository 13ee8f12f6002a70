"""/openapi.json tells the truth of every route, and /docs works without a network."""

import pathlib
import re
import time

import httpx
import pytest
import schemathesis
import werkzeug.test
from conftest import NAME
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks
from servers import KEY, Server

import main

EXAMPLES = settings(
    max_examples=15,
    deadline=None,
    database=None,
    derandomize=True,  # by chance, all of a route's requests may be bad ones
    suppress_health_check=list(HealthCheck),
)
GOOD = {"model": NAME, "prompt_name": "query", "dimensions": 3}
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
def test_every_route_answers_as_documented(service: Server, mode: GenerationMode) -> None:
    """Good and bad requests made up from the document: documented statuses and bodies, and 5xx
    never but for a picture, or a score, of a model that gives vectors of texts (501).
    """
    absent = re.compile("/image|/rerank|/classify|/predict")

    def try_one(case: schemathesis.Case) -> None:
        # Chance does not find a model's name; every second request gets those there are.
        if mode.is_positive and len(statuses) % 2:
            for sent in (case.body, case.path_parameters):
                if isinstance(sent, dict):
                    sent |= {name: value for name, value in GOOD.items() if name in sent}
        response = case.call(headers={"X-API-Key": KEY})
        case.validate_response(response, checks=CHECKS)
        statuses.append(response.status_code)
        if response.status_code >= 500:
            assert response.status_code == 501
            scores = operation.path == "/" and "query" in case.body
            other = absent.search(operation.path) or scores
            assert other or case.body["modality"] == "image"

    api = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
    api.validate()
    operations = [result.ok() for result in api.get_all_operations()]
    for operation in operations:
        statuses: list[int] = []
        if mode.is_negative and not operation.body and not operation.path_parameters:
            continue  # nothing in it can be wrong
        requests = given(case=operation.as_strategy(generation_mode=mode))
        requests(EXAMPLES(lambda case: try_one(case)))()
        good = 501 if absent.search(operation.path) else 200
        assert good in statuses or mode.is_negative, (operation.label, set(statuses))
    assert len(operations) >= 13
    assert "Traceback" not in service.log


def test_every_route_is_documented(models_dir: pathlib.Path) -> None:
    app = main.Application({"MODELS_DIR": str(models_dir)})
    app.start()
    client = werkzeug.test.Client(app)
    while client.get("/health/ready").status_code != 200:
        time.sleep(0.05)
    routes = {
        re.sub("<(?:path:)?(.*)>", r"{\1}", rule.rule)
        for rule in app.flask.url_map.iter_rules()
        if not rule.endpoint.startswith("docs.") and rule.endpoint != "ollama.absent"
    }
    assert client.get("/openapi.json").json["paths"].keys() == routes


def test_the_document_says_what_needs_no_key_and_what_is_refused(service: Server) -> None:
    document = service.client.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    assert "security" in document and document["components"]["securitySchemes"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            keyless = httpx.request(method, service.url + path, trust_env=False).status_code != 401
            assert (
                (operation.get("security") == [])
                == keyless
                == ("401" not in operation["responses"])
            )
    assert document["components"]["schemas"]["EmbedText"]["additionalProperties"] is False
    errors = document["paths"]["/v1/embeddings"]["post"]["responses"]["504"]["content"]
    assert errors["application/json"]["schema"]["$ref"].endswith("/OpenAIError")


def test_the_page_needs_nothing_from_elsewhere(service: Server) -> None:
    """Nor a key."""
    with httpx.Client(base_url=service.url, trust_env=False) as client:
        page = client.get("/docs")
        assert page.headers["Content-Type"].startswith("text/html") and "//" not in page.text
        needed = re.findall(r'(?:src|href|url: ?)=?"?([\w/.-]+)"', page.text)
        assert needed == ["docs/swagger-ui.css", "docs/swagger-ui-bundle.js", "openapi.json"]
        for path in needed:
            answer = client.get(f"/{path}")
            assert answer.status_code == 200 and len(answer.content) > 10_000
        css = client.get("/docs/swagger-ui.css").text
        assert not re.search(r"url\(['\"]?(?!['\"]?data:)", css)
        assert client.get("/docs/swagger-ui.js").status_code == 401
