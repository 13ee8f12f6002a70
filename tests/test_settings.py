"""settings.py: what is read, what is refused and how, and that docs/operate.md says the same."""

import pathlib
import re
from dataclasses import fields

import pytest
from servers import ROOT

from settings import (
    Settings,
    SettingsError,
    available_cores,
    load,
    near_misses,
    refuse_open_door,
    taken,
)

KEY = "VECTOR_EMBEDDER_API_KEY"


def test_defaults() -> None:
    settings = load({})
    assert (settings.port, settings.precision, settings.models_dir) == (5001, "auto", "models")
    assert settings.api_keys == ("abc123",)
    assert settings.inference_threads == available_cores()


def test_values_are_read_and_white_space_around_them_is_not() -> None:
    settings = load(
        {
            "PORT": " 8080 ",
            "PRECISION": "INT8",
            "REQUEST_TIMEOUT": "0.5",
            KEY: "one, two",
            "INFERENCE_THREADS": "7",
        }
    )
    assert (settings.port, settings.precision, settings.request_timeout) == (8080, "int8", 0.5)
    assert settings.api_keys == ("one", "two")
    assert settings.inference_threads == 7


def test_set_but_empty_counts_as_not_set() -> None:
    assert load({"PORT": "", "PRECISION": " "}) == load({})


@pytest.mark.parametrize(
    ("name", "value", "takes"),
    [
        ("PORT", "http", "a whole number from 1 to 65535"),
        ("PORT", "0", "a whole number from 1 to 65535"),
        ("PORT", "65536", "a whole number from 1 to 65535"),
        ("PORT", "80.5", "a whole number from 1 to 65535"),
        ("MAX_TEXT_SIZE", "-1", "a whole number from 1 to 1073741824"),
        ("REQUEST_TIMEOUT", "nan", "a number from 0.001 to 3600.0"),
        ("REQUEST_TIMEOUT", "soon", "a number from 0.001 to 3600.0"),
        ("PRECISION", "fp8", "one of auto, fp32, bf16, int8, fp16"),
        ("DEVICE", "gpu", "auto, cpu, cuda or cuda:N"),
        ("DEVICE", "cuda:x", "auto, cpu, cuda or cuda:N"),
        ("TRUNCATION", "cut", "one of honour, average"),
        ("OPENAI_TOKEN_IDS", "o200k_base", "one of cl100k_base, off"),
        ("MAX_INPUTS", "0", "a whole number from 1 to 100000"),
        ("LOG_LEVEL", "loud", "one of debug, info, warning, error"),
        ("LOG_FORMAT", "xml", "one of text, json"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_got_and_takes(
    name: str, value: str, takes: str
) -> None:
    with pytest.raises(SettingsError) as info:
        load({name: value})
    assert str(info.value) == f"{name}={value!r}; it takes {takes}"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("MAX_TEXT_PER_BATCH", "MAX_TEXTS_PER_BATCH"),
        ("MAX_BATCH_TEXTS", "MAX_BATCH_TOKENS"),
        ("max_body_size", "MAX_BODY_SIZE"),
        ("VECTOR_EMBEDDER_KEY", "VECTOR_EMBEDDER_API_KEY"),
        ("EMBEDDINGS_MODEL", "EMBEDDING_MODEL"),
        ("LOGLEVEL", "LOG_LEVEL"),
        ("CORS_ORIGIN", "CORS_ORIGINS"),
        ("WEB_CONCURENCY", "WEB_CONCURRENCY"),
    ],
)
def test_a_misspelt_name_is_told_from_others(name: str, meant: str) -> None:
    assert near_misses({name: "1", "PORT": "1", meant: "1"}) == {name: meant}


def test_names_of_other_programs_are_not_ours_misspelt() -> None:
    others = (
        "HOSTNAME SPORT PORTS HOSTS HOME PATH API_KEY MODEL_DIR MODEL_NAME CCACHE_SIZE "
        "HISTSIZE OMP_NUM_THREADS MAX_CONCURRENT_REQUESTS MAX_INPUT_LENGTH "
        "TOKENIZERS_PARALLELISM LC_NUMERIC GUNICORN_CMD_ARGS K_SERVICE GOOGLE_CLOUD_PROJECT "
        "TOKENIZER_MODEL LS_COLORS BATCH_SIZE VECTOR_EMBEDDER_SERVICE_HOST "
        "VECTOR_EMBEDDER_PORT VECTOR_EMBEDDER_PORT_5001_TCP_ADDR REQUESTS_CA_BUNDLE "
        "CUDA_VISIBLE_DEVICES LOGNAME WEB_BROWSER MAX_JOBS SERVICE_PORT"
    )
    assert near_misses(dict.fromkeys(others.split(), "1")) == {}


@pytest.mark.parametrize("keys", ["", " ", ",", "a,,b", "a b", "schlüssel", "a\x07"])
def test_keys_that_cannot_be_sent_are_refused_and_not_repeated(keys: str) -> None:
    with pytest.raises(SettingsError, match=KEY) as info:
        load({KEY: keys})
    assert not keys.strip(", ") or keys not in str(info.value)


def test_keys_from_a_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "keys"
    path.write_text("first\nsecond\n")
    assert load({f"{KEY}_FILE": str(path)}).api_keys == ("first", "second")
    path.write_text("first,second")
    assert load({f"{KEY}_FILE": str(path)}).api_keys == ("first", "second")
    with pytest.raises(SettingsError, match="both set"):
        load({f"{KEY}_FILE": str(path), KEY: "third"})
    path.write_text("\n")
    with pytest.raises(SettingsError, match=f"{KEY}_FILE: every key must be printable"):
        load({f"{KEY}_FILE": str(path)})
    with pytest.raises(SettingsError, match=f"{KEY}_FILE=.*cannot be read"):
        load({f"{KEY}_FILE": str(tmp_path / "absent")})


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({}, "is the default, which everybody knows"),
        ({KEY: "abc123"}, "is the default, which everybody knows"),
        ({KEY: "a-key-of-mine,abc123"}, "is the default"),
        ({KEY: "app:abc123"}, "is the default"),
        ({KEY: "seven77"}, "has a key of under 8 characters"),
        ({KEY: "a-key-of-mine,k"}, "has a key of under 8 characters"),
        ({KEY: "a-long-name:seven77"}, "has a key of under 8 characters"),
    ],
)
def test_a_key_that_others_know_or_guess_is_for_this_machine(
    environ: dict[str, str], says: str
) -> None:
    settings = load(environ)
    for hosts in (["127.0.0.1"], ["::1"], ["127.0.0.9", "localhost"], []):
        refuse_open_door(settings, hosts)
    for hosts in (["::"], ["0.0.0.0"], ["127.0.0.1", "10.0.0.1"], ["embedder"]):
        with pytest.raises(SettingsError) as info:
            refuse_open_door(settings, hosts)
        assert str(info.value).startswith(f"{KEY} {says}")
        assert f"others can reach {hosts[-1]}" in str(info.value)
        assert "HOST=127.0.0.1" in str(info.value) and "ALLOW_DEFAULT_KEY=1" in str(info.value)
        assert settings.api_keys[-1] not in str(info.value).partition(" ")[2].split()
        refuse_open_door(load({**environ, "ALLOW_DEFAULT_KEY": "1"}), hosts)
    refuse_open_door(load({KEY: "8-chars!,name:a-key-of-mine"}), ["::"])


@pytest.mark.parametrize(
    ("entries", "names", "keys"),
    [
        ("one-key", ["#1"], ["one-key"]),
        ("app:one-key, two-key", ["app", "#2"], ["one-key", "two-key"]),
        ("app:old-key,app:new-key", ["app", "app"], ["old-key", "new-key"]),
        ("a:b:c", ["a"], ["b:c"]),
        ("a.b:c", ["#1"], ["a.b:c"]),
        (":c", ["#1"], [":c"]),
        (f"{'n' * 32}:c", ["n" * 32], ["c"]),
        (f"{'n' * 33}:c", ["#1"], [f"{'n' * 33}:c"]),
        ("same,same", ["#1"], ["same"]),
    ],
)
def test_keys_may_have_names(entries: str, names: list[str], keys: list[str]) -> None:
    found = load({KEY: entries}).keys
    assert ([name for name, _ in found], [key for _, key in found]) == (names, keys)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ("app:", "none may be empty"),
        ("a:k,b:k", "one key has two names"),
        ("a:k,b:a:k", "one key has two names, or is another's with its name before it"),
        ("b:#2:k,k", "one key has two names, or is another's"),
        ("a:b:k,b:k,c:k-of-c", "one key has two names, or is another's"),
    ],
)
def test_names_without_a_key_of_their_own_are_refused(entries: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        load({KEY: entries})


@pytest.mark.parametrize("host", ["no such host", "a" * 64 + ".b", "\xad", "192.0.2.1"])
def test_an_address_that_is_not_here_is_said_in_a_line(host: str) -> None:
    said = taken((host, 5001))
    assert said and re.search(r"cannot listen on .*\(.+\); (it takes an address|set another)", said)
    assert "\n" not in said


def test_limits_of_keys() -> None:
    keys = {KEY: "app:first-key,second-key,batch:third-key"}
    assert load(keys).limits_of_keys == {}
    limits = "app: requests_per_second=5; tokens_per_minute=1e5 , batch:concurrent_tokens=20000"
    of_two = {
        "app": {"requests_per_second": 5.0, "tokens_per_minute": 100_000.0},
        "batch": {"concurrent_tokens": 20_000.0},
    }
    assert load({**keys, "KEY_LIMITS": limits}).limits_of_keys == of_two
    with_rest = load({**keys, "KEY_LIMITS": limits + ",*:requests_per_second=0.5"}).limits_of_keys
    assert with_rest == {**of_two, "#2": {"requests_per_second": 0.5}}


@pytest.mark.parametrize(
    "limits",
    [
        *("app", "app:", "app:requests_per_second", "app:requests_per_second=", "app:=5"),
        *("app:requests_per_second=x", "app:requests_per_second=0", "app:tokens_per_minute=-1"),
        *("app:tokens_per_minute=nan", "app:tokens_per_minute=inf", "app:tokens=5", ","),
        *("app:tokens_per_minute=5;", "app:tokens_per_minute=5;tokens_per_minute=6"),
        *("app:tokens_per_minute=5=6", ":tokens_per_minute=5"),
        "app:tokens_per_minute=5,app:requests_per_second=5",
    ],
)
def test_limits_of_another_form(limits: str) -> None:
    with pytest.raises(SettingsError, match="^KEY_LIMITS") as info:
        load({KEY: "app:first-key", "KEY_LIMITS": limits})
    assert re.search("it takes name:limit=number|names ''", str(info.value))


def test_limits_of_a_key_that_there_is_not() -> None:
    with pytest.raises(SettingsError, match="names 'ap'; the keys are named #2, app; `\\*` is for"):
        load({KEY: "app:first-key,second-key", "KEY_LIMITS": "ap:tokens_per_minute=5"})


def test_the_queue_is_as_long_as_half_of_a_requests_time() -> None:
    assert load({}).max_queue_seconds == 30.0
    assert load({"REQUEST_TIMEOUT": "5"}).max_queue_seconds == 2.5
    assert load({"MAX_QUEUE_SECONDS": "7"}).max_queue_seconds == 7.0


def test_the_log_is_json_on_cloud_run_unless_told_otherwise() -> None:
    run = {KEY: "mine", "K_SERVICE": "embedder"}
    assert load({}).log_format == "text"
    assert load(run).log_format == load({"LOG_FORMAT": "JSON"}).log_format == "json"
    assert load({**run, "LOG_FORMAT": "text"}).log_format == "text"


def test_a_request_may_be_larger_than_the_queue() -> None:
    """An empty queue takes it."""
    settings = load({"MAX_REQUEST_TOKENS": "2000", "MAX_QUEUE_TOKENS": "1000"})
    assert (settings.max_request_tokens, settings.max_queue_tokens) == (2000, 1000)


def test_token_ids_are_taken_where_their_table_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    table = tmp_path / "cl100k_base.bin"
    monkeypatch.setattr("settings.CL100K_TABLE", table)
    assert load({}).openai_token_ids == load({"OPENAI_TOKEN_IDS": "OFF"}).openai_token_ids == "off"
    with pytest.raises(
        SettingsError, match="OPENAI_TOKEN_IDS='cl100k_base', but the table .* make"
    ):
        load({"OPENAI_TOKEN_IDS": "cl100k_base"})
    table.touch()
    assert load({}).openai_token_ids == "cl100k_base"
    assert load({"OPENAI_TOKEN_IDS": "cl100k_base"}).openai_token_ids == "cl100k_base"
    assert load({"OPENAI_TOKEN_IDS": "off"}).openai_token_ids == "off"


def test_cores_are_those_of_the_cgroup(tmp_path: pathlib.Path) -> None:
    all_cores = available_cores(tmp_path / "nothing")
    for quota, cores in {
        "max 100000": all_cores,
        "50000 100000": 1,
        "100000 100000": 1,
        "99900000 100000": all_cores,
    }.items():
        (tmp_path / "cpu.max").write_text(quota)
        assert available_cores(tmp_path) == cores
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    for quota, cores in {"-1": all_cores, "100000": 1}.items():
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
        (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
        assert available_cores(tmp_path) == cores


def test_inference_threads_share_the_cores() -> None:
    assert load({"WEB_CONCURRENCY": "256"}).inference_threads == 1


def test_the_page_has_every_variable_its_default_and_its_help() -> None:
    rows = {}
    page = (ROOT / "docs" / "operate.md").read_text()
    section = page.partition("\n## Settings\n")[2].partition("\n## ")[0]
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 3 and cells[0].isupper():
            rows[cells[0]] = (cells[1].strip("`"), cells[2])
    expected = {}
    for option in fields(Settings):
        rules = option.metadata
        default = rules.get("by") or (
            f"{option.default:g}" if option.type is float else str(option.default)
        )
        expected[rules["name"]] = (default, rules["help"])
    assert rows == expected


def test_aliases() -> None:
    assert load({}).aliases == {}
    aliases = load({"MODEL_ALIASES": "ada = e5 , x/y=a.b-c,*=e5,q:1=a/b:c:query"}).aliases
    assert aliases == {"ada": "e5", "x/y": "a.b-c", "*": "e5", "q:1": "a/b:c:query"}


@pytest.mark.parametrize("value", ["ada", "ada=", "=e5", "a=b=c", "a=b,", "a=b,a=c", ","])
def test_aliases_of_another_form(value: str) -> None:
    with pytest.raises(SettingsError) as info:
        load({"MODEL_ALIASES": value})
    assert str(info.value).startswith(f"MODEL_ALIASES={value!r}; it takes alias=name,alias=name")
