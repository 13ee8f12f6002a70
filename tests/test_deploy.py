"""deploy/ and the commands of docs/deploy.md: they agree with the service, with each other, and
with the platforms' own limits. `make lint` checks their form.
"""

import json
import re
import shlex
from dataclasses import fields
from typing import Any

import httpx
import pytest
import yaml
from servers import KEY, ROOT, Server

from settings import Settings

PAGE = (ROOT / "docs" / "deploy.md").read_text()
IMAGE = "ghcr.io/OWNER/REPO:latest"
DEFAULTS = Settings()


def manifests(path: str) -> list[Any]:
    return list(yaml.safe_load_all((ROOT / "deploy" / path).read_text()))


(CLOUD_RUN,) = manifests("cloudrun.yaml")
KUBERNETES = {manifest["kind"]: manifest for manifest in manifests("kubernetes.yaml")}
(BASETEN,) = manifests("baseten/config.yaml")
REVISION = CLOUD_RUN["spec"]["template"]["spec"]
POD = KUBERNETES["Deployment"]["spec"]["template"]["spec"]
CONTAINERS = {"cloudrun": REVISION["containers"][0], "kubernetes": POD["containers"][0]}
PROBES = {
    f"{platform} {name}": probe
    for platform, container in CONTAINERS.items()
    for name, probe in container.items()
    if name.endswith("Probe")
}


def gunicorn_setting(name: str) -> int:
    match = re.search(rf"^{name} = (\d+)", (ROOT / "gunicorn.conf.py").read_text(), re.MULTILINE)
    assert match
    return int(match[1])


def test_every_variable_is_one_that_the_service_reads() -> None:
    named = [variable["name"] for container in CONTAINERS.values() for variable in container["env"]]
    named += BASETEN["environment_variables"]
    assert set(named) <= {option.metadata["name"] for option in fields(Settings)}


def test_every_platform_runs_the_image_on_its_default_port() -> None:
    for container in CONTAINERS.values():
        assert container["image"] == IMAGE
        assert [port["containerPort"] for port in container["ports"]] == [DEFAULTS.port]
    assert BASETEN["base_image"]["image"] == IMAGE
    assert BASETEN["docker_server"]["server_port"] == DEFAULTS.port


@pytest.mark.parametrize("name", PROBES)
def test_probes_ask_what_is_open_and_no_longer_than_their_period(
    name: str, service: Server
) -> None:
    probe = PROBES[name]
    assert probe["httpGet"]["path"] == ("/health" if "liveness" in name else "/health/ready")
    assert httpx.get(service.url + probe["httpGet"]["path"]).status_code == 200
    assert probe["timeoutSeconds"] <= probe["periodSeconds"]
    if "startup" in name:
        assert probe["periodSeconds"] * probe["failureThreshold"] == 240


def test_no_key_is_written_down() -> None:
    for container in CONTAINERS.values():
        (key,) = [e for e in container["env"] if e["name"] == "VECTOR_EMBEDDER_API_KEY"]
        assert "value" not in key and "secretKeyRef" in key["valueFrom"]
    (secret,) = BASETEN["secrets"]
    assert BASETEN["secrets"][secret] is None
    assert BASETEN["environment_variables"]["VECTOR_EMBEDDER_API_KEY_FILE"] == f"/secrets/{secret}"


def test_no_platform_sends_more_than_there_are_threads() -> None:
    assert REVISION["containerConcurrency"] < DEFAULTS.request_threads
    assert BASETEN["runtime"]["predict_concurrency"] < DEFAULTS.request_threads


def test_cloud_run_waits_longer_than_the_service() -> None:
    assert REVISION["timeoutSeconds"] > DEFAULTS.request_timeout


def test_the_page_deploys_to_cloud_run_what_the_manifest_says() -> None:
    match = re.search(r"^(gcloud run deploy (?:.+\\\n)*.+)", PAGE, re.MULTILINE)
    assert match
    name, *words = shlex.split(match[1].replace("\\\n", ""))[3:]
    flags = dict(word.removeprefix("--").partition("=")[::2] for word in words)
    metadata = CLOUD_RUN["spec"]["template"]["metadata"]["annotations"]
    container = CONTAINERS["cloudrun"]
    plain, secret = container["env"]
    reference = secret["valueFrom"]["secretKeyRef"]

    def probe(name: str) -> str:
        values = {**container[name], "httpGet.path": container[name]["httpGet"]["path"]}
        keys = ("httpGet.path", "periodSeconds", "timeoutSeconds", "failureThreshold")
        return ",".join(f"{key}={values[key]}" for key in keys)

    assert name == CLOUD_RUN["metadata"]["name"]
    assert flags == {
        "region": "REGION",
        "image": container["image"],
        "allow-unauthenticated": "",
        "service-account": REVISION["serviceAccountName"],
        "cpu": container["resources"]["limits"]["cpu"],
        "memory": container["resources"]["limits"]["memory"],
        "cpu-boost": "",
        "execution-environment": metadata["run.googleapis.com/execution-environment"],
        "port": str(container["ports"][0]["containerPort"]),
        "concurrency": str(REVISION["containerConcurrency"]),
        "timeout": str(REVISION["timeoutSeconds"]),
        "max-instances": metadata["autoscaling.knative.dev/maxScale"],
        "set-env-vars": f"{plain['name']}={plain['value']}",
        "set-secrets": f"{secret['name']}={reference['name']}:{reference['key']}",
        "startup-probe": probe("startupProbe"),
        "liveness-probe": probe("livenessProbe"),
    }
    assert metadata["run.googleapis.com/startup-cpu-boost"] == "true"
    assert f"gcloud secrets create {reference['name']} " in PAGE


def test_kubernetes_lets_what_was_accepted_be_answered() -> None:
    pause = CONTAINERS["kubernetes"]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert POD["terminationGracePeriodSeconds"] > pause + gunicorn_setting("graceful_timeout")


def test_kubernetes_manifests_name_each_other() -> None:
    deployment = KUBERNETES["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert KUBERNETES["Service"]["spec"]["selector"] == labels
    assert KUBERNETES["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    target = KUBERNETES["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    ports = {port["name"] for port in CONTAINERS["kubernetes"]["ports"]}
    assert {port["targetPort"] for port in KUBERNETES["Service"]["spec"]["ports"]} <= ports
    reference = CONTAINERS["kubernetes"]["env"][0]["valueFrom"]["secretKeyRef"]
    assert f"create secret generic {reference['name']} " in PAGE
    assert f"--from-literal={reference['key']}=" in PAGE


def test_baseten_asks_routes_that_there_are(service: Server) -> None:
    server = BASETEN["docker_server"]
    assert service.post(server["predict_endpoint"], {"input": "a"}).status_code == 200
    for probe in ("readiness_endpoint", "liveness_endpoint"):
        assert httpx.get(service.url + server[probe]).status_code == 200
    assert f"a-key-of-your-own {server['start_command']}\n" in PAGE


def test_baseten_starts_what_the_image_starts() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    (command,) = re.findall(r"^CMD (\[.+\])$", dockerfile, re.MULTILINE)
    assert BASETEN["docker_server"]["start_command"].split() == json.loads(command)
    assert re.search(
        rf"^USER {BASETEN['docker_server']['run_as_user_id']}\b", dockerfile, re.MULTILINE
    )


def test_a_platform_may_use_authorization_for_itself(service: Server) -> None:
    """Cloud Run's identity tokens and Baseten's keys: X-API-Key decides beside them."""
    for foreign in ("Bearer eyJhbGciOiJSUzI1NiJ9.e30.c2ln", "Api-Key abc.def"):
        headers = {"X-API-Key": KEY, "Authorization": foreign}
        response = httpx.post(service.url + "/embeddings", json={"text": "a"}, headers=headers)
        assert response.status_code == 200
