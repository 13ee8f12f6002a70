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
GPU_PAGE = (ROOT / "docs" / "gpu.md").read_text()
DEFAULTS = Settings()


def manifests(path: str) -> list[Any]:
    return list(yaml.safe_load_all((ROOT / "deploy" / path).read_text()))


# Each without and with a GPU.
KINDS = ["", "-gpu"]
CLOUD_RUN = {kind: manifests(f"cloudrun{kind}.yaml")[0] for kind in KINDS}
KUBERNETES = {
    kind: {each["kind"]: each for each in manifests(f"kubernetes{kind}.yaml")} for kind in KINDS
}
BASETEN = {kind: manifests(f"baseten{kind}/config.yaml")[0] for kind in KINDS}
REVISIONS = {kind: CLOUD_RUN[kind]["spec"]["template"]["spec"] for kind in KINDS}
PODS = {kind: KUBERNETES[kind]["Deployment"]["spec"]["template"]["spec"] for kind in KINDS}
CONTAINERS = {
    f"{platform}{kind}": specs[kind]["containers"][0]
    for platform, specs in (("cloudrun", REVISIONS), ("kubernetes", PODS))
    for kind in KINDS
}
IMAGES = {"": "ghcr.io/OWNER/REPO:latest", "-gpu": "ghcr.io/OWNER/REPO:cuda"}
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
    """LD_LIBRARY_PATH apart, which the driver needs."""
    named = [variable["name"] for container in CONTAINERS.values() for variable in container["env"]]
    named += [name for config in BASETEN.values() for name in config["environment_variables"]]
    known = {option.metadata["name"] for option in fields(Settings)}
    assert set(named) <= known | {"LD_LIBRARY_PATH"}


def test_every_platform_runs_the_image_on_its_default_port() -> None:
    for name, container in CONTAINERS.items():
        assert container["image"] == IMAGES["-gpu" if "gpu" in name else ""]
        assert [port["containerPort"] for port in container["ports"]] == [DEFAULTS.port]
    for kind, config in BASETEN.items():
        assert config["base_image"]["image"] == IMAGES[kind]
        assert config["docker_server"]["server_port"] == DEFAULTS.port


def environment(container: Any) -> dict[str, str]:
    """The variables that are written down."""
    return {each["name"]: each["value"] for each in container["env"] if "value" in each}


def test_every_platform_gives_a_gpu_and_does_without_none() -> None:
    """With DEVICE=cuda the service does not start on the CPU."""
    for name in ("cloudrun-gpu", "kubernetes-gpu"):
        assert CONTAINERS[name]["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert environment(CONTAINERS[name])["DEVICE"] == "cuda"
    (cloud_run,) = REVISIONS["-gpu"]["nodeSelector"].items()
    assert cloud_run == ("run.googleapis.com/accelerator", "nvidia-l4")
    (gke,) = PODS["-gpu"]["nodeSelector"].items()
    assert gke == ("cloud.google.com/gke-accelerator", "nvidia-l4")
    assert BASETEN["-gpu"]["resources"]["accelerator"] == "L4"
    assert BASETEN["-gpu"]["environment_variables"]["DEVICE"] == "cuda"


def test_the_page_builds_the_image_that_the_gpu_files_run() -> None:
    (command,) = re.findall(r"^docker build (?:.+\\\n)*.+", GPU_PAGE, re.MULTILINE)
    words = shlex.split(command.replace("\\\n", ""))
    assert words[words.index("-t") + 1] == IMAGES["-gpu"]
    assert f"docker push {IMAGES['-gpu']}\n" in GPU_PAGE
    assert "ENGINE=torch" in words
    (index,) = [word for word in words if word.startswith("TORCH_SERVE_INDEX=")]
    assert re.search(r"/whl/cu\d+$", index)


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
    for config in BASETEN.values():
        (secret,) = config["secrets"]
        assert config["secrets"][secret] is None
        path = config["environment_variables"]["VECTOR_EMBEDDER_API_KEY_FILE"]
        assert path == f"/secrets/{secret}"


def test_no_platform_sends_more_than_there_are_threads() -> None:
    for kind in KINDS:
        assert REVISIONS[kind]["containerConcurrency"] < DEFAULTS.request_threads
        assert BASETEN[kind]["runtime"]["predict_concurrency"] < DEFAULTS.request_threads


@pytest.mark.parametrize("kind", KINDS)
def test_cloud_run_waits_longer_than_the_service(kind: str) -> None:
    assert REVISIONS[kind]["timeoutSeconds"] > DEFAULTS.request_timeout


@pytest.mark.parametrize(("kind", "page"), [("", PAGE), ("-gpu", GPU_PAGE)], ids=["cpu", "gpu"])
def test_the_page_deploys_to_cloud_run_what_the_manifest_says(kind: str, page: str) -> None:
    match = re.search(r"^(gcloud run deploy (?:.+\\\n)*.+)", page, re.MULTILINE)
    assert match
    name, *words = shlex.split(match[1].replace("\\\n", ""))[3:]
    flags = dict(word.removeprefix("--").partition("=")[::2] for word in words)
    metadata = CLOUD_RUN[kind]["spec"]["template"]["metadata"]["annotations"]
    revision, container = REVISIONS[kind], CONTAINERS[f"cloudrun{kind}"]
    plain, secret = container["env"]
    reference = secret["valueFrom"]["secretKeyRef"]

    def probe(name: str) -> str:
        values = {**container[name], "httpGet.path": container[name]["httpGet"]["path"]}
        keys = ("httpGet.path", "periodSeconds", "timeoutSeconds", "failureThreshold")
        return ",".join(f"{key}={values[key]}" for key in keys)

    gpu = {
        "gpu": container["resources"]["limits"].get("nvidia.com/gpu"),
        "gpu-type": revision.get("nodeSelector", {}).get("run.googleapis.com/accelerator"),
        "no-gpu-zonal-redundancy": "",
        "no-cpu-throttling": "",
    }
    assert name == CLOUD_RUN[kind]["metadata"]["name"]
    assert flags == {
        **(gpu if kind else {}),
        "region": "REGION",
        "image": container["image"],
        "allow-unauthenticated": "",
        "service-account": revision["serviceAccountName"],
        "cpu": container["resources"]["limits"]["cpu"],
        "memory": container["resources"]["limits"]["memory"],
        "cpu-boost": "",
        "execution-environment": metadata["run.googleapis.com/execution-environment"],
        "port": str(container["ports"][0]["containerPort"]),
        "concurrency": str(revision["containerConcurrency"]),
        "timeout": str(revision["timeoutSeconds"]),
        "max-instances": metadata["autoscaling.knative.dev/maxScale"],
        "set-env-vars": f"{plain['name']}={plain['value']}",
        "set-secrets": f"{secret['name']}={reference['name']}:{reference['key']}",
        "startup-probe": probe("startupProbe"),
        "liveness-probe": probe("livenessProbe"),
    }
    assert metadata["run.googleapis.com/startup-cpu-boost"] == "true"
    if kind:
        assert metadata["run.googleapis.com/gpu-zonal-redundancy-disabled"] == "true"
        assert metadata["run.googleapis.com/cpu-throttling"] == "false"
    assert f"gcloud secrets create {reference['name']} " in PAGE


@pytest.mark.parametrize("kind", KINDS)
def test_kubernetes_lets_what_was_accepted_be_answered(kind: str) -> None:
    pause = CONTAINERS[f"kubernetes{kind}"]["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace = PODS[kind]["terminationGracePeriodSeconds"]
    assert grace > pause + gunicorn_setting("graceful_timeout")


@pytest.mark.parametrize("kind", KINDS)
def test_kubernetes_manifests_name_each_other(kind: str) -> None:
    manifests, container = KUBERNETES[kind], CONTAINERS[f"kubernetes{kind}"]
    deployment = manifests["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert manifests["Service"]["spec"]["selector"] == labels
    if not kind:
        assert manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
        target = manifests["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    ports = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in manifests["Service"]["spec"]["ports"]} <= ports
    reference = container["env"][0]["valueFrom"]["secretKeyRef"]
    assert f"create secret generic {reference['name']} " in PAGE
    assert f"--from-literal={reference['key']}=" in PAGE


def test_either_autoscaler_scales_the_deployment() -> None:
    by_cpu = KUBERNETES[""]["HorizontalPodAutoscaler"]
    by_queue = manifests("kubernetes-queue-autoscaler.yaml")[0]
    assert by_queue["metadata"] == by_cpu["metadata"]  # so one replaces the other
    for field in ("scaleTargetRef", "minReplicas", "maxReplicas"):
        assert by_queue["spec"][field] == by_cpu["spec"][field]


@pytest.mark.parametrize("kind", KINDS)
def test_baseten_asks_routes_that_there_are(kind: str, service: Server) -> None:
    server = BASETEN[kind]["docker_server"]
    assert service.post(server["predict_endpoint"], {"input": "a"}).status_code == 200
    for probe in ("readiness_endpoint", "liveness_endpoint"):
        assert httpx.get(service.url + server[probe]).status_code == 200
    assert f"a-key-of-your-own {server['start_command']}\n" in PAGE


def test_baseten_starts_what_the_image_starts() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    (command,) = re.findall(r"^CMD (\[.+\])$", dockerfile, re.MULTILINE)
    for config in BASETEN.values():
        server = config["docker_server"]
        assert server["start_command"].split() == json.loads(command)
        assert re.search(rf"^USER {server['run_as_user_id']}\b", dockerfile, re.MULTILINE)


def test_a_platform_may_use_authorization_for_itself(service: Server) -> None:
    """Cloud Run's identity tokens and Baseten's keys: X-API-Key decides beside them."""
    for foreign in ("Bearer eyJhbGciOiJSUzI1NiJ9.e30.c2ln", "Api-Key abc.def"):
        headers = {"X-API-Key": KEY, "Authorization": foreign}
        response = httpx.post(service.url + "/embeddings", json={"text": "a"}, headers=headers)
        assert response.status_code == 200
