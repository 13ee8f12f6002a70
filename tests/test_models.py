"""engine/models.py: which name finds which model, and in what order they load."""

import pathlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import NAME, WIDE

from engine.bundle import Bundle, read
from engine.errors import ModelNotFound, ModelNotReady
from engine.models import Models


def two(models_dir: pathlib.Path) -> list[Bundle]:
    return [read(models_dir / NAME), read(models_dir / WIDE)]


def test_names_sources_and_aliases_find_a_model(models_dir: pathlib.Path) -> None:
    models: Models[str] = Models(two(models_dir), aliases={"text-embedding-3-small": WIDE})
    models.load(lambda bundle: bundle.manifest.name)
    for asked, found in {
        None: NAME,
        NAME: NAME,
        f"sentence-transformers/{WIDE}": WIDE,
        "text-embedding-3-small": WIDE,
    }.items():
        assert models.get(asked, time.monotonic()) == found
    message = f"no model 'x' here; there is: {NAME}, {WIDE}"
    with pytest.raises(ModelNotFound, match=message) as info:
        models.get("x", time.monotonic())
    assert info.value.field == "model"


def test_a_default_or_alias_that_names_nothing(models_dir: pathlib.Path) -> None:
    with pytest.raises(ModelNotFound, match="'x'"):
        Models[str](two(models_dir), "x")
    with pytest.raises(ModelNotFound, match="'y'"):
        Models[str](two(models_dir), aliases={"x": "y"})


def test_the_default_loads_first_and_readiness_means_all(models_dir: pathlib.Path) -> None:
    models: Models[str] = Models(two(models_dir), WIDE)
    order = []

    def load(bundle: Bundle) -> str:
        assert not models.ready
        order.append(bundle.manifest.name)
        return bundle.manifest.name

    with pytest.raises(ModelNotReady, match=f"model {NAME} is still loading"):
        models.get(NAME, time.monotonic())
    models.load(load)
    assert order == [WIDE, NAME] and models.ready
    models.warming = True
    assert not models.ready


def test_stop_ends_the_wait_for_a_model(models_dir: pathlib.Path) -> None:
    models: Models[str] = Models(two(models_dir))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(models.get, NAME, time.monotonic() + 60)
        models.stop()
        with pytest.raises(ModelNotReady):
            waiting.result()
    models.load(lambda bundle: bundle.manifest.name)
    assert models.get(NAME, time.monotonic()) == NAME
