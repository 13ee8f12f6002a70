"""/openapi.json, made of the types that validate requests, and Swagger UI at /docs, from files that
come with a package.
"""

import http
import importlib.util
import pathlib
import re
from collections.abc import Collection
from typing import Any

import msgspec
from flask import Blueprint, Flask, Response, current_app

from api.codec import json_response
from api.errors import dialect
from api.service import VERSION, Operation

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


def document(app: Flask, open_paths: Collection[str]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of every route made with `api.service.endpoint`."""
    routes: list[tuple[str, str, Operation, str, str]] = []
    for rule in app.url_map.iter_rules():
        view = app.view_functions[rule.endpoint]
        operation = getattr(view, "operation", None)
        if operation is not None:
            (method,) = (rule.methods or set()) - {"HEAD", "OPTIONS"}
            path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
            routes.append((path, method.lower(), operation, rule.endpoint, view.__doc__ or ""))
    bodies = list(dict.fromkeys(body for _, _, made, _, _ in routes for body in made.bodies))
    _, schemas = msgspec.json.schema_components(bodies, ref_template=_REF)
    paths: dict[str, Any] = {}

    def content(kind: Any, form: str = "application/json") -> dict[str, Any]:
        (schema,), components = msgspec.json.schema_components([kind], ref_template=_REF)
        schemas.update(components)
        return {form: {"schema": schema}}

    for path, method, made, name, summary in routes:
        answers: dict[int, Any] = {200: made.answer, 500: None, **made.further}
        if path not in open_paths:
            answers[401] = None
        if "{" in path:
            answers[404] = None
        if made.bodies:
            answers |= dict.fromkeys(_BODY_ERRORS)
        described: dict[str, Any] = {
            "operationId": name.replace(".", "_"),
            "tags": [name.partition(".")[0]],
            "summary": summary,
            "responses": {
                str(status): {
                    "description": http.HTTPStatus(status).phrase,
                    "content": (
                        content(dialect(path)[1])
                        if kind is None
                        else content(kind, made.produces if status == 200 else "application/json")
                    ),
                }
                for status, kind in sorted(answers.items())
            },
        }
        if path in open_paths:
            described["security"] = []
        if "{" in path:
            described["parameters"] = [
                {"name": field, "in": "path", "required": True, "schema": {"type": "string"}}
                for field in re.findall(r"{(\w+)}", path)
            ]
        if made.bodies:
            kinds = [{"$ref": _REF.format(name=body.__name__)} for body in made.bodies]
            schema = {"anyOf": kinds} if len(kinds) > 1 else kinds[0]
            described["requestBody"] = {
                "required": True,
                "content": {
                    "application/json": {"schema": schema},
                    **{kind: {"schema": schema} for kind, schema in made.media.items()},
                },
            }
        paths.setdefault(path, {})[method] = described
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


def blueprint(open_paths: Collection[str]) -> Blueprint:
    """GET /openapi.json and /docs; `open_paths` need no key."""
    routes = Blueprint("docs", __name__)
    package = importlib.util.find_spec("flask_swagger_ui")
    assert package and package.origin
    folder = pathlib.Path(package.origin).parent / "dist"

    @routes.get("/openapi.json")
    def openapi() -> Response:
        return json_response(document(current_app, open_paths))

    @routes.get("/docs")
    def page() -> Response:
        return Response(_PAGE, content_type="text/html; charset=utf-8")

    @routes.get(f"/docs/<any({','.join(map(repr, _FILES))}):name>")
    def file(name: str) -> Response:
        # Read whole: gunicorn's sendfile would write past api/worker.py's Socket.
        return Response((folder / name).read_bytes(), content_type=_FILES[name])

    return routes
