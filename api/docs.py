"""/openapi.json, made of the types that validate requests, and Swagger UI at /docs, from files that
come with a package.
"""

import functools
import http
import importlib.util
import pathlib
import re
from collections.abc import Collection
from typing import Any

import msgspec
from flask import Blueprint, Flask, Response, current_app

from api.codec import JSON, write_json
from api.endpoint import VERSION, Operation
from api.errors import dialect
from api.fields import field_types, options_of

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
_BODY_ERRORS = (400, 404, 408, 413, 415, 429, 501, 503, 504)
_REF = "#/components/schemas/{name}"


def document(app: Flask, open_paths: Collection[str]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of every route made with `api.endpoint.endpoint`."""
    paths: dict[str, Any] = {}
    schemas: dict[str, Any] = {}
    for rule in app.url_map.iter_rules():
        view = app.view_functions[rule.endpoint]
        if hasattr(view, "operation"):
            (method,) = (rule.methods or set()) - {"HEAD", "OPTIONS"}
            path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
            described = {
                "operationId": rule.endpoint.replace(".", "_"),
                "tags": [rule.endpoint.partition(".")[0]],
                "summary": view.__doc__ or "",
                **_describe(path, view.operation, path in open_paths, schemas),
            }
            paths.setdefault(path, {})[method.lower()] = described
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


def _describe(path: str, made: Operation, is_open: bool, schemas: dict[str, Any]) -> dict[str, Any]:
    """What one operation takes and answers. The schemas that it refers to go to `schemas`."""

    def refer(*kinds: Any) -> list[dict[str, Any]]:
        references, components = msgspec.json.schema_components(kinds, ref_template=_REF)
        schemas.update(components)
        return [*references]

    statuses: dict[int, Any] = {200: made.answer, 500: None, **made.further}
    if not is_open:
        statuses[401] = None
    if "{" in path:
        statuses[404] = None
    if made.bodies:
        statuses |= dict.fromkeys(_BODY_ERRORS)
    responses = {}
    for status, kind in sorted(statuses.items()):
        (schema,) = refer(dialect(path)[1] if kind is None else kind)
        responses[str(status)] = {
            "description": http.HTTPStatus(status).phrase,
            "content": {made.produces if status == 200 else JSON: {"schema": schema}},
        }
    described: dict[str, Any] = {"responses": responses}
    if is_open:
        described["security"] = []
    if made.media:  # a picture itself has no fields for options
        described["parameters"] = [
            {"name": name, "in": "query", "schema": msgspec.json.schema(kind)}
            for name, kind in field_types(options_of(made.bodies[0])).items()
        ]
    if "{" in path:
        described["parameters"] = [
            {"name": field, "in": "path", "required": True, "schema": {"type": "string"}}
            for field in re.findall(r"{(\w+)}", path)
        ]
    if made.bodies:
        kinds = refer(*made.bodies)
        taken = {JSON: {"anyOf": kinds} if len(kinds) > 1 else kinds[0], **made.media}
        content = {media: {"schema": schema} for media, schema in taken.items()}
        described["requestBody"] = {"required": True, "content": content}
    return described


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
