"""README.md and docs/: their commands work, and their links lead somewhere. test_docs_tables.py
checks their tables.

The convention for code blocks: the first word of the fence says what the block holds, and these
tests run every command in it. Further words exempt the block, because it needs

    ```sh needs-docker      a Docker daemon
    ```sh needs-account     an account or a cluster of the platform
    ```python needs-package a client library that the tests do not install; js likewise

and a test checks that it does. How each kind is run:

    sh      curl, tests/smoke.py and ruby: against a service
            gunicorn: until the service is ready and has answered
            make: as a dry run; the bake's options are looked up as those of our own commands
            our own Python commands: with --help, which must list every option
            pip: what it would install is installed here
            any other command fails a test: say here how to run it, or mark the block
    python  as a program, against a service
    js      with node, against a service
    yaml    is parsed
    text    is output, for the reader only

In every block `localhost:5001` stands for the tests' service, and `abc123` for its key.
"""

import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

import httpx
import pytest
import tiny_clip
import yaml
from servers import KEY, ROOT, Server, free_port

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
TOPICS = "api clients models deploy gpu operate performance architecture troubleshooting upgrading"
MARKS = {"needs-docker", "needs-account", "needs-package"}
CLIENTS = {"openai", "huggingface_hub", "ollama"}  # libraries that the tests install
MODEL = "all-MiniLM-L6-v2"
BIN = pathlib.Path(sys.executable).parent


class Block(NamedTuple):
    page: str
    line: int
    kind: str
    marks: frozenset[str]
    text: str

    @property
    def id(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> list[Block]:
    found = []
    for page, text in PAGES.items():
        for match in re.finditer(r"^```(.*)\n((?s:.*?))^```$", text, re.MULTILINE):
            kind, *marks = match[1].split() or [""]
            line = text[: match.start()].count("\n") + 1
            found.append(Block(page, line, kind, frozenset(marks), match[2]))
    return found


BLOCKS = blocks()
COMMANDS: list[Any] = [
    pytest.param(command, id=f"{block.id}: {command[:60]}")
    for block in BLOCKS
    if block.kind == "sh" and not block.marks
    for line in block.text.replace("\\\n", " ").splitlines()
    for command in line.split(" && ")
]


def of_kind(kind: str) -> list[Any]:
    found = [block for block in BLOCKS if block.kind == kind and "needs-package" not in block.marks]
    return [pytest.param(block, id=block.id) for block in found]


def packages(block: Block) -> set[str]:
    """What a program imports that neither its language brings nor the tests install."""
    if block.kind == "js":
        return set(re.findall(r'^import .* from "([^"]+)"', block.text, re.MULTILINE))
    names = re.findall(r"^(?:from|import) (\w+)", block.text, re.MULTILINE)
    return set(names) - sys.stdlib_module_names - CLIENTS


def program(command: str) -> tuple[list[str], list[str]]:
    """The variables set before a command, and its words, without a comment."""
    words = shlex.split(command, comments=True)
    count = next(at for at, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
    return words[:count], words[count:]


def runs(command: str) -> str:
    """Which test runs a command."""
    _, words = program(command)
    name = pathlib.Path(words[0]).name
    if name in ("curl", "make", "gunicorn", "pip", "ruby"):
        return name
    if name.startswith("python"):
        return "smoke" if words[1] == "tests/smoke.py" else "help"
    return "unknown"


def run_by(name: str) -> list[Any]:
    return [param for param in COMMANDS if runs(param.values[0]) == name]


def for_service(text: str, service: Server) -> str:
    return text.replace("localhost:5001", f"127.0.0.1:{service.port}").replace("abc123", KEY)


def test_the_pages_are_those_that_the_readme_lists() -> None:
    expected = {f"docs/{topic}.md" for topic in TOPICS.split()}
    assert set(PAGES) == expected | {"README.md"}
    assert set(re.findall(r"\]\((docs/\w+\.md)", PAGES["README.md"])) == expected


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_blocks_are_of_a_known_kind_and_mark() -> None:
    assert {block.kind for block in BLOCKS} <= {"sh", "python", "js", "yaml", "text"}
    for block in BLOCKS:
        assert block.marks <= MARKS, block.id
    assert all(text.count("\n```") % 2 == 0 for text in PAGES.values())


def test_marks_are_true() -> None:
    """A block is exempt only if a command in it needs what its mark says."""
    needs = {
        "needs-docker": r"^docker |\| docker ",
        "needs-account": r"^(gcloud|kubectl|truss) |\| (gcloud|kubectl) |--secret ",
    }
    for block in BLOCKS:
        text = block.text.replace("\\\n", " ")
        found = {mark for mark, shape in needs.items() if re.search(shape, text, re.MULTILINE)}
        if block.kind in ("python", "js") and packages(block):
            found = {"needs-package"}
        assert found == block.marks, block.id


@pytest.mark.parametrize("block", of_kind("sh"))
def test_bash_can_read_every_command(block: Block) -> None:
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


@pytest.mark.usefixtures("shared")  # it says that bundles are needed
@pytest.mark.parametrize("command", run_by("curl"))
def test_curl_gets_a_good_response(
    command: str, request: pytest.FixtureRequest, tmp_path: pathlib.Path
) -> None:
    """Commands for pictures get a service that takes them, and files of the names they use; those
    for scores a service that has them.
    """
    scores = re.search("/(rerank|classify|predict)", command)
    name = "clip_service" if "/embeddings/image" in command else "service"
    service: Server = request.getfixturevalue("scoring" if scores else name)
    for name in set(re.findall(r"[\w-]+\.jpg", command)):
        tiny_clip.picture("red", "square", random.Random(1)).save(tmp_path / name)
    command = for_service(command, service)
    command = command.replace("curl ", "curl --silent --show-error --fail-with-body ", 1)
    out = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0, out.stdout + out.stderr
    assert "error" not in json.loads(out.stdout)


def test_every_command_is_run() -> None:
    unknown = [param.id for param in run_by("unknown")]
    assert unknown == [], "say here how they are run, or mark their block"


@pytest.mark.parametrize("command", run_by("make"))
def test_make_has_the_target_and_the_options(command: str) -> None:
    variables, words = program(command)
    dry = subprocess.run(
        [*words, "--dry-run", "--always-make"],
        cwd=ROOT,
        env={**os.environ, **dict(pair.split("=", 1) for pair in variables)},
        capture_output=True,
        text=True,
    )
    assert dry.returncode == 0, dry.stderr
    makefile = (ROOT / "Makefile").read_text()
    for word in words[1:]:
        name, given, _ = word.partition("=")
        assert re.search(rf"^{name} \?=" if given else rf"^{name}:", makefile, re.MULTILINE), word
    bakes = [line for line in dry.stdout.splitlines() if "bake_model.py" in line]
    assert bakes or words[1] not in ("run", "bake")
    for line in bakes:
        check_options(shlex.split(line)[1:])


@pytest.mark.parametrize("command", run_by("help"))
def test_our_commands_know_the_options(command: str) -> None:
    check_options(program(command)[1][1:])


def check_options(words: list[str]) -> None:
    """Run a Python command of ours for its help, and look for the options in it."""
    if words == ["-m", "engine.encoder.build"]:  # takes no option, and `make test` has run it
        assert importlib.util.find_spec(words[1])
        return
    script = words[:2] if words[0] == "-m" else words[:1]
    says = help_of(*script)
    for word in words[len(script) :]:
        if word.startswith("-"):
            assert re.search(rf"(?<!\S){word.partition('=')[0]}\b", says), word
        elif word in ("recommend", "ceiling", "fairness", "padding", "start"):
            assert re.search(rf"^ +{word} ", says, re.MULTILINE), word


@functools.cache
def help_of(*script: str) -> str:
    command = [sys.executable, *script, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", run_by("pip"))
def test_pip_installs_what_is_installed_here(command: str) -> None:
    _, words = program(command)
    assert words[1] == "install"
    if words[2] == "-r":
        # Not those that only other platforms or Pythons get.
        words[2:] = re.findall(r"^([\w-]+)==\S+ \\$", (ROOT / words[3]).read_text(), re.MULTILINE)
    for word in words[2:]:
        name, _, version = word.partition("==")
        installed = importlib.metadata.version(name)
        assert installed == (version or installed)


@pytest.mark.parametrize("command", run_by("gunicorn"))
def test_gunicorn_starts_the_service(command: str, models_dir: pathlib.Path) -> None:
    variables, words = program(command)
    port = free_port()
    given = dict(pair.split("=", 1) for pair in variables)
    key = given.setdefault("VECTOR_EMBEDDER_API_KEY", KEY).partition(",")[0]
    given |= {"MODELS_DIR": str(models_dir), "PORT": str(port)}
    with subprocess.Popen(
        [str(BIN / words[0]), *words[1:]], cwd=ROOT, env={**os.environ, **given}
    ) as process:
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
            with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
                while time.monotonic() < deadline and process.poll() is None:
                    try:
                        if client.get("/health/ready").status_code == 200:
                            break
                    except httpx.TransportError:
                        pass
                    time.sleep(0.1)
                response = client.post("/embed", json={"text": "a"}, headers={"X-API-Key": key})
            assert response.status_code == 200
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.mark.parametrize("command", run_by("smoke"))
def test_smoke_finds_no_fault(command: str, service: Server) -> None:
    _, words = program(for_service(command, service))
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("ruby") is None, reason="needs ruby")
@pytest.mark.parametrize("command", run_by("ruby"))
def test_the_ruby_application_runs(command: str, service: Server) -> None:
    variables, words = program(for_service(command, service))
    given = dict(pair.split("=", 1) for pair in variables)
    environ = {**os.environ, "LANG": "C.UTF-8", **given}
    with subprocess.Popen(words, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True) as app:
        assert app.stdout
        lines = [app.stdout.readline(), app.stdout.readline()]
        app.send_signal(signal.SIGTERM)
        app.communicate(timeout=30)
    assert lines[0] == f"ready: {MODEL} at {service.url}\n"
    assert "384 dimensions" in lines[1]


@pytest.mark.parametrize("block", of_kind("python"))
def test_python_programs_run(block: Block, service: Server) -> None:
    run_program([sys.executable, "-W", "error", "-c"], block, service)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.parametrize("block", of_kind("js"))
def test_javascript_programs_run(block: Block, service: Server) -> None:
    run_program(["node", "--input-type=module", "-e"], block, service)


def run_program(interpreter: list[str], block: Block, service: Server) -> None:
    environ = {name: value for name, value in os.environ.items() if "PROXY" not in name.upper()}
    done = subprocess.run(
        [*interpreter, for_service(block.text, service)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout  # every example prints what it got
    if "vectors of" in block.text:
        assert done.stdout == "2 vectors of 384 numbers\n"


@pytest.mark.parametrize("block", of_kind("yaml"))
def test_yaml_is_yaml(block: Block) -> None:
    assert yaml.safe_load(block.text)


# Links


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "SECURITY.md"])
def test_links_lead_to_files_and_headings_that_there_are(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if re.match("https?://", target):
            assert target.startswith("https://"), target
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.is_file(), target
        if anchor:
            assert anchor in anchors(path.read_text()), target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_are_there(page: str) -> None:
    """A path in backticks is one of this repository. What a bundle holds, and what earlier versions
    had, is not."""
    text = PAGES[page]
    if page == "docs/upgrading.md":
        text = re.sub(r"^\| `(?:engine|api|stress|python).*?\|", "|", text, flags=re.MULTILINE)
    named = re.findall(r"`([\w./-]+(?:/|\.(?:py|yaml|json|txt|so|conf\.py)))`", text)
    missing = {
        name
        for name in named
        if not (ROOT / name).exists()
        and name not in ("manifest.json", "/openapi.json", "docs/", "encoder.so")
        and "NAME" not in name
    }
    assert missing == set()
