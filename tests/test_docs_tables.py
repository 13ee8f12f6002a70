"""README.md and docs/: their tables and defaults are those of the code. test_docs.py runs the
commands.
"""

import json
import os
import re
import shlex
import subprocess
import sys

import yaml
from servers import ROOT, Server
from test_docs import MODEL, PAGES


def section(page: str, heading: str) -> str:
    text = PAGES[page].partition(f"\n## {heading}\n")[2]
    assert text, f"{page} has no section {heading}"
    return text.partition("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of every row of a text's tables."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|") and not line.startswith("|---")
    ]


def makefile_default(name: str) -> str:
    match = re.search(rf"^{name} \?= *(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert match, name
    return match[1]


def dockerfile_arguments() -> dict[str, str]:
    """Names and defaults. A stage that takes an argument from above names it once more."""
    found = re.findall(r"^ARG (\w+)=?(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    return dict(sorted(found, key=lambda pair: bool(pair[1])))


def test_there_is_one_default_model() -> None:
    assert makefile_default("MODEL") == MODEL
    assert dockerfile_arguments()["EMBEDDING_MODEL"] == MODEL
    compose = (ROOT / "compose.yaml").read_text()
    assert f"EMBEDDING_MODEL: ${{EMBEDDING_MODEL:-{MODEL}}}" in compose
    assert f"#EMBEDDING_MODEL={MODEL}\n" in (ROOT / ".env.example").read_text()
    assert f"(default {MODEL})" in (ROOT / ".github/workflows/publish.yml").read_text()
    assert f"holds the model {MODEL} " in PAGES["README.md"]
    assert f"holds `{MODEL}`," in PAGES["docs/deploy.md"]
    assert f"| {MODEL} | 384 | 256 | English | the default" in PAGES["docs/models.md"]
    others = ("Dockerfile", "Makefile", "compose.yaml", ".env.example", "README.md")
    for path in (*others, *(ROOT / "deploy").rglob("*.yaml"), *(ROOT / ".github").rglob("*.yml")):
        assert "multi-qa" not in (ROOT / path).read_text(), path


def test_torch_without_cuda_is_the_default() -> None:
    index = "https://download.pytorch.org/whl/cpu"
    assert makefile_default("TORCH_INDEX") == dockerfile_arguments()["TORCH_INDEX"] == index

    def recipe(*variables: str) -> str:
        command = ["make", "--dry-run", "--always-make", "VENV=new", "new/.run", *variables]
        environ = {name: value for name, value in os.environ.items() if name != "TORCH_INDEX"}
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.replace("\\\n", " ")

    first, fallback, rest = re.findall(r"new/bin/pip install (.*)", recipe())
    assert f"--extra-index-url {index} " in first
    assert re.search(r" torch==[\d.]+$", first) and "-r requirements.txt" in rest
    assert "--extra-index-url" not in fallback + rest
    assert "--extra-index-url" not in recipe("TORCH_INDEX=")
    assert "PIP_EXTRA_INDEX_URL" not in (ROOT / ".github/workflows/test.yml").read_text()


def test_the_image_and_the_workflow_know_the_engines() -> None:
    engines = re.findall(r"^ +(\w+)\) \\$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    workflow = yaml.safe_load((ROOT / ".github/workflows/publish.yml").read_text())
    triggers = workflow[True]  # YAML 1.1 reads `on` as true
    assert triggers["workflow_dispatch"]["inputs"]["engine"]["options"] == engines
    assert engines == [dockerfile_arguments()["ENGINE"], "torch"] == ["openvino", "torch"]
    arguments = set(re.findall(r"format\('(\w+)=", workflow["jobs"]["image"]["env"]["BUILD_ARGS"]))
    assert arguments < set(dockerfile_arguments())


def test_the_table_of_build_arguments_is_the_dockerfiles() -> None:
    told = {
        cells[0]: cells[1].strip("`")
        for cells in rows(section("docs/deploy.md", "Build an image with your model"))
        if cells[0].isupper()
    }
    arguments = dockerfile_arguments()
    assert set(told) == set(arguments)
    assert {name: told[name] for name, default in arguments.items() if default} == {
        name: default for name, default in arguments.items() if default
    }
    used = re.findall(r"--build-arg (\w+)=", "".join(PAGES.values()))
    assert used and set(used) <= set(arguments)


def test_the_tables_of_the_bake_are_those_of_make_and_bake_model() -> None:
    text = section("docs/models.md", "Bake it")
    for cells in rows(text):
        names, defaults = re.findall(r"`(\w+)`", cells[0]), re.findall(r"`(.*?)`", cells[1])
        if names and names[0].isupper() and names[0] != "NAME":
            assert [makefile_default(name) for name in names] == (defaults or [""]), cells
    done = subprocess.run(
        [sys.executable, "bake_model.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    options = set(re.findall(r"^  (?:-h, )?(--[\w-]+)", done.stdout, re.MULTILINE)) - {"--help"}
    told = [cells[0] for cells in rows(text) if cells[0].startswith("`--")]
    assert set(re.findall(r"--[\w-]+", " ".join(told))) == options


def test_api_has_every_route_and_field(service: Server) -> None:
    document = service.client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    told = {
        (method.lower(), path)
        for method, path in re.findall(r"`(GET|POST) (/[\w/{}]*)`", PAGES["docs/api.md"])
    }
    served = {(method, path) for path, methods in document["paths"].items() for method in methods}
    # GET / is a text for clients that look for a server.
    assert told - {("get", "/")} == served

    def fields(name: str) -> set[str]:
        found: set[str] = set()
        for field, schema in schemas[name]["properties"].items():
            found.add(field)
            for reference in re.findall(r'#/components/schemas/(\w+)"', json.dumps(schema)):
                found |= fields(reference)
        return found

    sections = {
        "Scores": r"/(rerank|classify|predict|v[12]/rerank)$",
        "OpenAI": r"/v1/",
        "Pictures": r"/embeddings/image",
        "Own routes": r"/embeddings",
        "Ollama": r"/api/",
        "text-embeddings-inference": r"/(embed|similarity|tokenize|info)?$",
    }
    for path, methods in document["paths"].items():
        heading = next((name for name, start in sections.items() if re.match(start, path)), None)
        if heading is None:
            continue
        words = set(re.findall(r"`(\w+)`", section("docs/api.md", heading)))
        words |= {"text"} if path == "/embed" else set()  # the shorter form, under "Own routes"
        for operation in methods.values():
            body = json.dumps(operation.get("requestBody", {}))
            for reference in set(re.findall(r'#/components/schemas/(\w+)"', body)):
                assert fields(reference) <= words, path


def test_api_has_every_status_and_kind_of_error(service: Server) -> None:
    table = {cells[0]: cells[1] for cells in rows(section("docs/api.md", "Errors"))}
    document = service.client.get("/openapi.json").json()
    statuses = {
        status
        for methods in document["paths"].values()
        for operation in methods.values()
        for status in operation["responses"]
    } - {"200"}
    assert statuses <= set(table)
    for status, body, path in (
        (400, {"texts": []}, "/embeddings/batch"),
        (400, {"text": "a", "nonsense": 1}, "/embeddings"),
        (404, {"text": "a"}, "/nowhere"),
        (404, {"text": "a", "model": "nonsense"}, "/embeddings"),
        (405, {}, "/health"),
        (413, {"text": "a" * 1_048_577}, "/embeddings"),
        (501, {"image": "AAAA"}, "/embeddings/image"),
    ):
        response = service.post(path, body)
        assert response.status_code == status
        assert f"`{response.json()['error_type']}`" in table[str(status)]


def test_the_readmes_settings_are_those_of_the_full_table() -> None:
    full = {cells[0]: cells[1] for cells in rows(section("docs/operate.md", "Settings"))}
    short = {cells[0]: cells[1] for cells in rows(section("README.md", "Five settings"))}
    assert len(short) == 6  # with the table's head
    assert short.items() <= full.items()


def test_limits_have_the_defaults_of_the_settings() -> None:
    full = {cells[0]: cells[1].strip("`") for cells in rows(section("docs/operate.md", "Settings"))}
    told = {
        cells[3]: re.sub(r"[^\d]", "", cells[1]) or cells[1]
        for cells in rows(section("docs/api.md", "Limits"))
        if len(cells) == 4 and cells[3].isupper()
    }
    assert len(told) == 11
    assert told.items() <= full.items()


def test_the_readme_deploys_what_the_page_deploys() -> None:
    """With fewer options; the key, which the page keeps in a secret, apart."""

    def flags(page: str) -> dict[str, str]:
        match = re.search(r"^gcloud run deploy (?:.+\\\n)*.+", PAGES[page], re.MULTILINE)
        assert match
        words = shlex.split(match[0].replace("\\\n", ""))[4:]
        return dict(word.removeprefix("--").partition("=")[::2] for word in words)

    short, full = flags("README.md"), flags("docs/deploy.md")
    plain, _, key = short.pop("set-env-vars").partition(",")
    assert plain == full["set-env-vars"]
    assert key == "VECTOR_EMBEDDER_API_KEY=a-key-of-your-own"
    assert short.items() <= full.items()
