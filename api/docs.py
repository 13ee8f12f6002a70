"""/openapi.json, made of the types that validate requests, and Swagger UI at /docs, from files that
come with a package.
"""

import functools
import http
import importlib.util
import pathlib
import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import msgspec
from flask import Blueprint, Flask, Response, current_app

from api.codec import JSON, write_json
from api.endpoint import VERSION, Operation
from api.errors import dialect

_FILES = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}
PATHS = ("/openapi.json", "/docs", *(f"/docs/{name}" for name in _FILES))
_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>Vector embedder</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script>
  SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui", validatorUrl: null})
</script>
</html>
"""
# What a body, and with it a model's work, can be answered with.
_BODY_ERRORS = (400, 404, 408, 413, 415, 429, 503, 504)
_REF = "#/components/schemas/{name}"


class Documented(NamedTuple):
    """A route, as /openapi.json describes it."""

    path: str
    method: str
    operation: Operation
    name: str
    summary: str


def document(app: Flask, open_paths: Collection[str]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of every route made with `api.endpoint.endpoint`."""
    routes = list(_routes(app))
    bodies = list(dict.fromkeys(body for route in routes for body in route.operation.bodies))
    _, schemas = msgspec.json.schema_components(bodies, ref_template=_REF)
    paths: dict[str, Any] = {}
    for route in routes:
        described = _describe(route, route.path in open_paths, schemas)
        paths.setdefault(route.path, {})[route.method] = described
    return {
        "openapi": "3.1.0",
        "info": {"title": "Vector embedder", "version": VERSION},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "bearer": {"type": "http", "scheme": "bearer"},
            },
        },
        "security": [{"key": []}, {"bearer": []}],
    }


def _routes(app: Flask) -> Iterator[Documented]:
    for rule in app.url_map.iter_rules():
        view = app.view_functions[rule.endpoint]
        operation = getattr(view, "operation", None)
        if operation is not None:
            (method,) = (rule.methods or set()) - {"HEAD", "OPTIONS"}
            path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
            yield Documented(path, method.lower(), operation, rule.endpoint, view.__doc__ or "")


def _describe(route: Documented, is_open: bool, schemas: dict[str, Any]) -> dict[str, Any]:
    """One operation. The schemas that it refers to are added to `schemas`."""
    path, made = route.path, route.operation
    statuses: dict[int, Any] = {200: made.answer, 500: None, **made.further}
    if not is_open:
        statuses[401] = None
    if "{" in path:
        statuses[404] = None
    if made.bodies:
        statuses |= dict.fromkeys(_BODY_ERRORS)

    def content(status: int, kind: Any) -> dict[str, Any]:
        kind = dialect(path)[1] if kind is None else kind
        (schema,), components = msgspec.json.schema_components([kind], ref_template=_REF)
        schemas.update(components)
        return {made.produces if status == 200 else JSON: {"schema": schema}}

    described: dict[str, Any] = {
        "operationId": route.name.replace(".", "_"),
        "tags": [route.name.partition(".")[0]],
        "summary": route.summary,
        "responses": {
            str(status): {
                "description": http.HTTPStatus(status).phrase,
                "content": content(status, kind),
            }
            for status, kind in sorted(statuses.items())
        },
    }
    if is_open:
        described["security"] = []
    if "{" in path:
        described["parameters"] = [
            {"name": field, "in": "path", "required": True, "schema": {"type": "string"}}
            for field in re.findall(r"{(\w+)}", path)
        ]
    if made.bodies:
        described["requestBody"] = {"required": True, "content": _body_content(made)}
    return described


def _body_content(made: Operation) -> dict[str, Any]:
    kinds = [{"$ref": _REF.format(name=body.__name__)} for body in made.bodies]
    schema = {"anyOf": kinds} if len(kinds) > 1 else kinds[0]
    return {JSON: {"schema": schema}, **{kind: {"schema": one} for kind, one in made.media.items()}}


def blueprint(open_paths: Collection[str]) -> Blueprint:
    """GET /openapi.json and /docs; `open_paths` need no key. Each is made or read once: all
    responses share its bytes.
    """
    routes = Blueprint("docs", __name__)
    package = importlib.util.find_spec("flask_swagger_ui")
    assert package and package.origin
    folder = pathlib.Path(package.origin).parent / "dist"

    @functools.cache
    def described() -> bytes:
        return write_json(document(current_app, open_paths))

    @functools.cache
    def content(name: str) -> bytes:
        return (folder / name).read_bytes()

    @routes.get("/openapi.json")
    def openapi() -> Response:
        return Response(described(), content_type=JSON)

    @routes.get("/docs")
    def page() -> Response:
        return Response(_PAGE, content_type="text/html; charset=utf-8")

    @routes.get(f"/docs/<any({','.join(map(repr, _FILES))}):name>")
    def file(name: str) -> Response:
        return Response(content(name), content_type=_FILES[name])

    return routes
