"""engine/models.py: which name finds which model, and in what order they load."""

import pathlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import NAME, WIDE

from engine.bundle import Bundle, read
from engine.errors import ModelNotFound, ModelNotReady, WrongAlias
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


def test_a_default_that_names_nothing(models_dir: pathlib.Path) -> None:
    with pytest.raises(ModelNotFound, match="'x'"):
        Models[str](two(models_dir), "x")


@pytest.mark.parametrize("aliases", [{"*": WIDE}, {"*": f"{WIDE}:query", "ada": NAME}])
@pytest.mark.parametrize("default", ["x", "*", f"{WIDE}:query", "ADA"])
def test_an_alias_for_every_name_makes_no_default_of_a_misspelt_one(
    models_dir: pathlib.Path, default: str, aliases: dict[str, str]
) -> None:
    with pytest.raises(ModelNotFound, match=f"no model '.*' here; there is: {NAME}, {WIDE}"):
        Models[str](two(models_dir), default, aliases)


def test_the_default_may_be_an_alias_unless_it_has_a_prompt(models_dir: pathlib.Path) -> None:
    aliases = {"ada": WIDE, "asking": f"{WIDE}:query"}
    assert Models[str](two(models_dir), "ada", aliases).default == WIDE
    says = f"EMBEDDING_MODEL=asking: this alias has the prompt 'query', .* name {WIDE}, or an alias"
    with pytest.raises(WrongAlias, match=says):
        Models[str](two(models_dir), "asking", aliases)


def test_an_alias_stands_for_a_model_and_maybe_a_prompt(models_dir: pathlib.Path) -> None:
    bundles = two(models_dir)
    # A name may have a colon: it begins a prompt only where the whole is no model.
    bundles[0].manifest.source = "hub.example:8080/minilm:query"
    meant = {
        "plain": WIDE,
        "asking": f"{WIDE}:query",
        "of-source": f"sentence-transformers/{WIDE}:document",
        "colons": "hub.example:8080/minilm:query",
        "colons-asking": "hub.example:8080/minilm:query:query",
        "a/b:c": NAME,
    }
    models: Models[str] = Models(bundles, aliases=meant)
    found = [models.resolve(alias) for alias in meant]
    assert [(one.asked, one.bundle.manifest.name, one.prompt) for one in found] == [
        ("plain", WIDE, None),
        ("asking", WIDE, "query"),
        ("of-source", WIDE, "document"),
        ("colons", NAME, None),
        ("colons-asking", NAME, "query"),
        ("a/b:c", NAME, None),
    ]
    assert models.aliases == found and all(one.alias for one in found)
    assert models.resolve() == models.resolve(NAME) and not models.resolve().alias
    assert all(map(models.knows, (NAME, f"sentence-transformers/{WIDE}", "asking", "a/b:c")))
    assert not models.knows("ada") and not models.knows("*")
    for name in ("ada", "*", "", "asking:query"):
        with pytest.raises(ModelNotFound):
            models.resolve(name)


def test_an_alias_for_every_name(models_dir: pathlib.Path) -> None:
    models: Models[str] = Models(two(models_dir), aliases={"*": f"{WIDE}:query", "ada": NAME})
    for asked, found in {
        NAME: (NAME, None),
        "ada": (NAME, None),
        None: (NAME, None),
        "text-embedding-3-small": (WIDE, "query"),
        "": (WIDE, "query"),
        "*": (WIDE, "query"),
    }.items():
        target = models.resolve(asked)
        assert (target.bundle.manifest.name, target.prompt) == found
        assert target.asked == (NAME if asked is None else asked)
    assert [target.asked for target in models.aliases] == ["ada"]
    assert not models.knows("text-embedding-3-small")


@pytest.mark.parametrize(
    "alias, meant, says",
    [
        ("x", "y", f"x=y: no model 'y' here; there is: {NAME}, {WIDE}"),
        ("x", "y:query", f"x=y:query: no model 'y' here; there is: {NAME}, {WIDE}"),
        ("x", ":query", f"x=:query: no model ':query' here; there is: {NAME}, {WIDE}"),
        ("x", f"{NAME}:", f"x={NAME}:: model {NAME} has no prompt ''; it has: document, query"),
        ("x", f"{NAME}:a", f"x={NAME}:a: model {NAME} has no prompt 'a'; it has: document, query"),
        ("*", "ada", f"*=ada: no model 'ada' here; there is: {NAME}, {WIDE}"),
        (WIDE, NAME, f"{WIDE}={NAME}: there is a model '{WIDE}' itself"),
        (NAME, f"{NAME}:query", f"{NAME}={NAME}:query: there is a model '{NAME}' itself"),
    ],
)
def test_an_alias_that_cannot_mean_anything(
    models_dir: pathlib.Path, alias: str, meant: str, says: str
) -> None:
    with pytest.raises(WrongAlias) as info:
        Models[str](two(models_dir), aliases={"ok": NAME, alias: meant})
    assert str(info.value) == f"MODEL_ALIASES: {says}"


def test_the_version_names_model_and_bundle(models_dir: pathlib.Path) -> None:
    models: Models[str] = Models(two(models_dir), aliases={"ada": WIDE})
    versions = [models.resolve(name).version for name in (NAME, WIDE, "ada")]
    assert versions[0] == f"{NAME}@{models.bundles[NAME].fingerprint()}"
    assert versions[1] == versions[2] != versions[0]


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
