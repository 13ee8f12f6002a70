"""Checks the files in deploy/ that no ready-made validator covers: cloudrun*.yaml against Google's
description of the Cloud Run API, baseten*/config.yaml as `truss push` does, and that *.json is
JSON. `make lint` runs it in the validators' environment (requirements-lint.txt).
"""

import json
import pathlib
import re
import sys
from typing import Any

import yaml
from googleapiclient.discovery_cache import get_static_doc
from jsonschema import Draft202012Validator
from truss.base.truss_config import TrussConfig

DEPLOY = pathlib.Path(__file__).parents[1] / "deploy"
FILLED_IN_BY_GCLOUD = ("namespace",)


def schema_errors(schema: dict[str, Any], document: Any) -> list[str]:
    errors = Draft202012Validator(schema).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in errors]


def cloud_run_schema(types: dict[str, Any]) -> dict[str, Any]:
    """Returns: JSON Schema of a Cloud Run service, made of the API's own `types`. It refuses other
    properties and those that the API's text calls unsupported; it requires those it calls required.
    """
    for kind in types.values():
        required = []
        for name, value in list(kind["properties"].items()):
            text = value.get("description", "")
            constant = re.search(r'must be "(.+?)"', text)
            if constant:
                value["const"] = constant[1]
            if constant or text.startswith("Required.") and name not in FILLED_IN_BY_GCLOUD:
                required.append(name)
            if text.startswith("Not supported"):
                del kind["properties"][name]
        kind.update(required=required, additionalProperties=False)
    definitions = re.sub(r'"\$ref": "(\w+)"', r'"$ref": "#/$defs/\1"', json.dumps(types))
    return {"$ref": "#/$defs/Service", "$defs": json.loads(definitions)}


def unknown_annotations(types: dict[str, Any], service: dict[str, Any]) -> list[str]:
    """Cloud Run's annotations that stand on an object that does not take them. The API's text lists
    annotations as "* `name`: Service, Revision.".
    """
    text = types["ObjectMeta"]["properties"]["annotations"]["description"]
    takers = {name: kinds.split(", ") for name, kinds in re.findall(r"\* `(.+?)`: ([\w, ]+)", text)}
    assert takers, "the API's text has another form now"
    return [
        f"annotation {name} does not belong to a {kind}"
        for kind, holder in (("Service", service), ("Revision", service["spec"]["template"]))
        for name in holder.get("metadata", {}).get("annotations", {})
        if re.match(r"run\.googleapis\.com|autoscaling\.knative\.dev", name)
        and kind not in takers.get(name, [])
    ]


def cloud_run_errors(path: pathlib.Path) -> list[str]:
    types = json.loads(get_static_doc("run", "v1"))["schemas"]
    service = yaml.safe_load(path.read_text())
    errors = schema_errors(cloud_run_schema(types), service)
    return errors or unknown_annotations(types, service)


def baseten_errors(path: pathlib.Path) -> list[str]:
    try:
        TrussConfig.from_yaml(path).validate_forbid_extra()  # as `truss push` does
    except ValueError as error:
        return [str(error)]
    return []


def json_errors(path: pathlib.Path) -> list[str]:
    try:
        json.loads(path.read_text())
    except ValueError as error:
        return [str(error)]
    return []


if __name__ == "__main__":
    files = {path: cloud_run_errors for path in DEPLOY.glob("cloudrun*.yaml")}
    files |= {path: baseten_errors for path in DEPLOY.glob("baseten*/config.yaml")}
    files |= {path: json_errors for path in DEPLOY.rglob("*.json")}
    errors = [f"{path}: {error}" for path, check in files.items() for error in check(path)]
    sys.exit("\n".join(errors) or None)
