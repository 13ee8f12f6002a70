"""Every environment variable: name, type, default, bounds, one line of help. Validated once, at
start.
"""

import difflib
import errno
import os
import pathlib
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from keys import DEFAULT_KEY, SHORT_KEY, ApiKey, parse_keys, parse_limits, sent_forms, why_unsafe

CL100K_TABLE = pathlib.Path(__file__).parent / "api" / "cl100k_base.bin"  # api/cl100k.py makes it
# An origin (RFC 6454) in ASCII; applications have schemes of their own, such as capacitor.
_ORIGIN = re.compile(
    r"[a-z][a-z0-9+.-]*://(?:[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:]+\])(?::\d{1,5})?"
)
_OTHERS_NAMES = {"MODEL_DIR", "CCACHE_SIZE"}  # close to ours, and used by other programs


class SettingsError(Exception):
    """A variable holds what it cannot take; the message names it, what it got and what it takes."""


def _option(name: str, default: Any, help: str, **rules: Any) -> Any:
    """A dataclass field read from environment variable `name`.

    Rules: `low` and `high` (numbers), `choices` or `pattern` and its description `takes` (strings),
    `by` (docs/operate.md's text for a default that is computed).
    """
    return field(default=default, metadata={"name": name, "help": help, **rules})


def available_cores(root: pathlib.Path = pathlib.Path("/sys/fs/cgroup")) -> int:
    """Cores this process may really use, at least 1: the cgroup's quota (v2, then v1) or the CPU
    set, whichever is less.
    """
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return cores
    if quota == "max" or int(quota) <= 0:
        return cores
    return max(1, min(cores, round(int(quota) / int(period))))


@dataclass(frozen=True)
class Settings:
    """The service's configuration. Built by `load`; handed down as plain values."""

    api_key: str = _option(
        "VECTOR_EMBEDDER_API_KEY",
        DEFAULT_KEY,
        "one or several keys, comma-separated, each as `key` or `name:key`; the default, and keys "
        "under 8 characters, are refused where others can reach them",
    )
    api_key_file: str = _option(
        "VECTOR_EMBEDDER_API_KEY_FILE", "", "file with the keys instead (a mounted secret)"
    )
    allow_default_key: int = _option(
        "ALLOW_DEFAULT_KEY",
        0,
        "1 takes the default key and short keys on every HOST",
        low=0,
        high=1,
    )
    key_limits: str = _option(
        "KEY_LIMITS",
        "",
        "limits of keys, by name, such as `app:requests_per_second=5;tokens_per_minute=100000`; "
        "`*` for all others; comma-separated",
    )
    host: str = _option(
        "HOST",
        "",
        "address to listen on",
        by="all of them, IPv6 and IPv4; IPv4 alone where the system has no IPv6",
    )
    port: int = _option("PORT", 5001, "port to listen on", low=1, high=65535)
    cors_origins: str = _option(
        "CORS_ORIGINS",
        "",
        "web pages that may call the service from a browser: origins such as "
        "`https://app.example.org`, comma-separated, or `*`",
        by="none",
    )
    models_dir: str = _option("MODELS_DIR", "models", "folder that holds the bundles")
    embedding_model: str = _option(
        "EMBEDDING_MODEL",
        "",
        "default model, by name, source or an alias without a prompt",
        by="the only bundle, else the one baked first",
    )
    model_aliases: str = _option(
        "MODEL_ALIASES",
        "",
        "further names, such as `text-embedding-3-small=all-MiniLM-L6-v2`, with a prompt "
        "(`e5-query=e5-base-v2:query`), or for every name (`*=e5-base-v2`); comma-separated",
    )
    precision: str = _option(
        "PRECISION",
        "auto",
        "auto (the fastest that is exact enough), fp32, int8 or, where every CPU has it, bf16; on "
        "a GPU also fp16",
        choices=("auto", "fp32", "bf16", "int8", "fp16"),
    )
    device: str = _option(
        "DEVICE",
        "auto",
        "where the torch engine computes: cpu, cuda (all GPUs), cuda:N (one), or auto (all GPUs, "
        "else the CPU)",
        pattern=r"auto|cpu|cuda(:\d{1,3})?",
        takes="auto, cpu, cuda or cuda:N",
    )
    encoder_isa: str = _option(
        "ENCODER_ISA",
        "auto",
        "most that the service's own engine may use of the CPU: portable, avx2, avxvnni, avx512, "
        "vnni, bf16, amx or auto (all that it has), for measurements; below bf16, PRECISION=auto "
        "takes no bf16",
        choices=("auto", "portable", "avx2", "avxvnni", "avx512", "vnni", "bf16", "amx"),
    )
    max_batch_size: int = _option(
        "MAX_BATCH_SIZE", 64, "most chunks in one engine call, on the CPU", low=1, high=4096
    )
    max_batch_tokens: int = _option(
        "MAX_BATCH_TOKENS",
        512,
        "most padded tokens in one engine call of several chunks, on the CPU",
        low=1,
        high=1_048_576,
    )
    max_texts_per_batch: int = _option(
        "MAX_TEXTS_PER_BATCH",
        100,
        "texts in one request of the service's own routes",
        low=1,
        high=100_000,
    )
    max_inputs: int = _option(
        "MAX_INPUTS",
        2048,
        "texts in one request of the routes of OpenAI, Ollama and text-embeddings-inference",
        low=1,
        high=100_000,
    )
    max_images_per_batch: int = _option(
        "MAX_IMAGES_PER_BATCH", 20, "pictures in one request", low=1, high=10_000
    )
    max_image_size: int = _option(
        "MAX_IMAGE_SIZE", 10_485_760, "bytes, one picture", low=1, high=1 << 30
    )
    max_image_pixels: int = _option(
        "MAX_IMAGE_PIXELS", 50_000_000, "width x height, one picture", low=1, high=1 << 30
    )
    max_text_size: int = _option("MAX_TEXT_SIZE", 1_048_576, "bytes, one text", low=1, high=1 << 30)
    max_body_size: int = _option(
        "MAX_BODY_SIZE", 33_554_432, "bytes, one request", low=1, high=1 << 30
    )
    # A connection sends some 14 kB before it waits for its client; up to about twice that, fewer
    # bytes save no time.
    compress_from: int = _option(
        "COMPRESS_FROM",
        32_768,
        "bytes from which a response is compressed for a client that accepts it; 0: never",
        low=0,
        high=1 << 30,
    )
    max_request_tokens: int = _option(
        "MAX_REQUEST_TOKENS",
        300_000,
        "tokens in one request, prompts and special tokens too",
        low=1,
        high=1 << 30,
    )
    max_queue_tokens: int = _option(
        "MAX_QUEUE_TOKENS",
        1_200_000,
        "waiting tokens beyond which 429 is answered",
        low=1,
        high=1 << 30,
    )
    max_queue_seconds: float = _option(
        "MAX_QUEUE_SECONDS",
        0.0,
        "seconds that a request would wait for its turn, at the speed measured, beyond which 429 "
        "is answered",
        low=0.001,
        high=3600.0,
        by="half of REQUEST_TIMEOUT",
    )
    request_timeout: float = _option(
        "REQUEST_TIMEOUT", 60.0, "seconds a request may wait", low=0.001, high=3600.0
    )
    truncation: str = _option(
        "TRUNCATION",
        "honour",
        "honour (a request's `truncate` cuts long texts) or average (it has no effect: the same "
        "text has the same vector, whichever client sends it)",
        choices=("honour", "average"),
    )
    openai_token_ids: str = _option(
        "OPENAI_TOKEN_IDS",
        "",
        "cl100k_base (OpenAI's route turns ids of that encoding back into text) or off",
        choices=("cl100k_base", "off"),
        by="cl100k_base where its table is, as in the image and after `make run`, else off",
    )
    cache_size: int = _option(
        "CACHE_SIZE",
        0,
        "vectors kept for texts that are sent again; some 2 kB each at 384 dimensions",
        low=0,
        high=100_000_000,
    )
    web_concurrency: int = _option(
        "WEB_CONCURRENCY", 1, "worker processes, each with its own model", low=1, high=256
    )
    request_threads: int = _option(
        "REQUEST_THREADS",
        64,
        "pictures, compressed bodies and bodies over 16 kB that one process works on at a time",
        low=1,
        high=4096,
    )
    inference_threads: int = _option(
        "INFERENCE_THREADS",
        0,
        "cores that one process computes on",
        low=0,
        high=1024,
        by="cores / WEB_CONCURRENCY",
    )
    log_level: str = _option(
        "LOG_LEVEL",
        "info",
        "debug, info, warning or error",
        choices=("debug", "info", "warning", "error"),
    )
    log_format: str = _option(
        "LOG_FORMAT",
        "",
        "text or json (with Cloud Logging's names)",
        choices=("text", "json"),
        by="json on Cloud Run, else text",
    )

    @property
    def keys(self) -> tuple[ApiKey, ...]:
        return parse_keys(self.api_key)

    @property
    def api_keys(self) -> tuple[str, ...]:
        """The keys without their names."""
        return tuple(key for _, key in self.keys)

    @property
    def secrets(self) -> tuple[str, ...]:
        """The keys that logs are searched for. Short ones are parts of other words."""
        return tuple(key for key in self.api_keys if len(key) >= SHORT_KEY)

    @property
    def limits_of_keys(self) -> dict[str, dict[str, float]]:
        """The limits of each key that has some, by its name. Raises: SettingsError."""
        try:
            return parse_limits(self.key_limits, [name for name, _ in self.keys])
        except ValueError as error:
            raise SettingsError(str(error)) from None

    @property
    def origins(self) -> tuple[str, ...]:
        """CORS_ORIGINS as browsers write them. Raises: SettingsError."""
        sent = self.cors_origins.strip().lower()
        origins = tuple(origin.strip() for origin in sent.split(",")) if sent else ()
        if origins == ("*",):
            return origins
        for origin in origins:
            # Browsers leave the scheme's own port out.
            own_port = re.fullmatch(r"http://.*:80|https://.*:443", origin)
            if own_port or not _ORIGIN.fullmatch(origin):
                raise SettingsError(
                    f"CORS_ORIGINS={self.cors_origins!r}, where {origin!r} is wrong; it takes "
                    "*, or origins as browsers send them: scheme, host and port, without a path "
                    "or a slash at the end, such as https://app.example.org or "
                    "http://localhost:3000; comma-separated"
                )
        return origins

    @property
    def aliases(self) -> dict[str, str]:
        """Raises: SettingsError."""
        aliases: dict[str, str] = {}
        for pair in self.model_aliases.split(",") if self.model_aliases else ():
            alias, name = (part.strip() for part in (pair + "=").split("=")[:2])
            if pair.count("=") != 1 or not alias or not name or alias in aliases:
                raise SettingsError(
                    f"MODEL_ALIASES={self.model_aliases!r}; it takes alias=name,alias=name or "
                    "alias=name:prompt, each alias once"
                )
            aliases[alias] = name
        return aliases


def load(environ: Mapping[str, str]) -> Settings:
    """Read and check the configuration. A variable that is set but empty counts as not set; a key
    may not be empty.

    Raises: SettingsError.
    """
    values: dict[str, Any] = {}
    for option in fields(Settings):
        raw = environ.get(option.metadata["name"], "")
        if raw.strip():
            values[option.name] = _parse(option, raw.strip())
    key_name, file_name = "VECTOR_EMBEDDER_API_KEY", "VECTOR_EMBEDDER_API_KEY_FILE"
    if "api_key_file" in values:
        if "api_key" in values:
            raise SettingsError(f"{key_name} and {file_name} are both set; set one")
        key_name = file_name
        try:
            values["api_key"] = ",".join(
                pathlib.Path(values["api_key_file"]).read_text("ascii").split()
            )
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(
                f"{file_name}={values['api_key_file']}: cannot be read ({error})"
            ) from None
    elif key_name in environ and "api_key" not in values:
        raise SettingsError(f"{key_name} is empty; set a key, or unset it")
    settings = Settings(**values)
    # The value itself stays out of every message: it would end up in logs.
    if not all(
        key and key.isascii() and key.isprintable() and " " not in key for key in settings.api_keys
    ):
        raise SettingsError(
            f"{key_name}: every key must be printable ASCII without spaces, and none may be empty"
        )
    sent = set(sent_forms(settings.keys))
    if len({key for _, key in sent}) < len(sent):
        raise SettingsError(
            f"{key_name}: one key has two names, or is another's with its name before it"
        )
    settings.aliases, settings.limits_of_keys, settings.origins  # raise SettingsError if malformed
    if settings.openai_token_ids == "cl100k_base" and not CL100K_TABLE.exists():
        raise SettingsError(
            "OPENAI_TOKEN_IDS='cl100k_base', but the table of that encoding is not here; make it "
            "with `make api/cl100k_base.bin`, or set off"
        )
    values["max_queue_seconds"] = settings.max_queue_seconds or settings.request_timeout / 2
    if not settings.inference_threads:
        values["inference_threads"] = max(1, -(-available_cores() // settings.web_concurrency))
    values["log_format"] = settings.log_format or log_format(environ)
    there = "cl100k_base" if CL100K_TABLE.exists() else "off"
    values["openai_token_ids"] = settings.openai_token_ids or there
    return Settings(**values)


def refuse_open_door(settings: Settings, hosts: Iterable[str]) -> None:
    """A key that is known or can be guessed is for this machine alone, unless ALLOW_DEFAULT_KEY
    says otherwise.

    Args:
        hosts: the addresses that are listened on.

    Raises: SettingsError.
    """
    why = None if settings.allow_default_key else why_unsafe(settings.api_keys, hosts)
    if why:
        name = "VECTOR_EMBEDDER_API_KEY" + ("_FILE" if settings.api_key_file else "")
        raise SettingsError(
            f"{name} {why}; set one of your own (`openssl rand -hex 32` makes one), or "
            "HOST=127.0.0.1 to serve this machine alone, or ALLOW_DEFAULT_KEY=1"
        )


def near_misses(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables whose names are close to a setting's, each with that setting's: misspelt ones, most
    likely. Names of fewer than 8 letters are like too many others.
    """
    names = [option.metadata["name"] for option in fields(Settings)]
    long = [name for name in names if len(name) >= 8]
    found = {}
    for name in sorted(set(environ) - {*names, *_OTHERS_NAMES}):
        enough = 0.82 if name.upper().startswith("MAX_") else 0.87
        if len(name) >= 8 and (close := difflib.get_close_matches(name.upper(), long, 1, enough)):
            found[name] = close[0]
    return found


def listen_address(settings: Settings) -> str:
    """HOST and PORT as gunicorn's `bind`. By default the IPv6 address that takes IPv4 too, where
    the system has both.

    Raises: SettingsError for a HOST that this machine cannot listen on.
    """
    for host in [settings.host] if settings.host else ["::", "0.0.0.0"]:
        try:
            (family, _, _, _, address), *_ = socket.getaddrinfo(
                host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            with socket.socket(family) as probe:
                probe.bind(address)
        except (OSError, UnicodeError) as error:
            reason = error
            continue
        host = str(address[0])
        return f"[{host}]:{settings.port}" if ":" in host else f"{host}:{settings.port}"
    raise SettingsError(
        f"HOST={settings.host!r}: cannot listen there ({reason}); it takes an address of this "
        "machine, such as 0.0.0.0, 127.0.0.1 or ::"
    )


def taken(address: tuple[str, int]) -> str | None:
    """Why gunicorn could not listen on an address, in a line; None where it can."""
    host, port = address
    try:
        (family, _, _, _, resolved), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        return f"cannot listen on {host!r} ({reason}); it takes an address of this machine"
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(resolved)
            probe.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return f"PORT={port} is taken by another process; stop that, or set another PORT"
            return f"PORT={port}: cannot listen on {host} ({error.strerror}); set another PORT"
    return None


def log_format(environ: Mapping[str, str]) -> str:
    """LOG_FORMAT, for what must be said before the configuration is known to be right."""
    default = "json" if "K_SERVICE" in environ else "text"
    return environ.get("LOG_FORMAT", "").strip().lower() or default


def _parse(option: "Field[Any]", raw: str) -> Any:
    rules, name, kind = option.metadata, option.metadata["name"], option.type
    if "choices" in rules:
        if raw.lower() not in rules["choices"]:
            raise SettingsError(f"{name}={raw!r}; it takes one of {', '.join(rules['choices'])}")
        return raw.lower()
    if "pattern" in rules:
        if not re.fullmatch(rules["pattern"], raw.lower()):
            raise SettingsError(f"{name}={raw!r}; it takes {rules['takes']}")
        return raw.lower()
    if kind is str:
        return raw
    low, high = rules["low"], rules["high"]
    try:
        value = kind(raw)  # type: ignore[operator]  # int or float
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        raise SettingsError(f"{name}={raw!r}; it takes {what} from {low} to {high}")
    return value
