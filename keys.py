"""The API keys as they are configured: their names, their limits, and whether others may reach the
service with them. `settings.py` has the variables; api/auth.py compares what requests bring.
"""

import ipaddress
import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

DEFAULT_KEY = "abc123"
SHORT_KEY = 8  # characters; a key of fewer can be guessed
LIMITS = ("requests_per_second", "tokens_per_minute", "concurrent_tokens")
_NAME = r"[A-Za-z0-9_-]{1,32}"


class ApiKey(NamedTuple):
    """A key and its name, which logs and metrics show: `#1` for the first key if it has none."""

    name: str
    key: str


def parse_keys(text: str) -> tuple[ApiKey, ...]:
    """The keys of a comma-separated list, each `key` or `name:key`."""
    entries = [entry.strip() for entry in text.split(",")]
    named = {entry: re.fullmatch(f"({_NAME}):(.*)", entry) for entry in entries}
    return tuple(
        ApiKey(*match.groups()) if match else ApiKey(f"#{entries.index(entry) + 1}", entry)
        for entry, match in named.items()
    )


def sent_forms(keys: Iterable[tuple[str, str]]) -> list[ApiKey]:
    """All that is taken for a key, with the key's name: some clients send `name:key` whole."""
    return [ApiKey(name, sent) for name, key in keys for sent in (key, f"{name}:{key}")]


def parse_limits(text: str, names: Collection[str]) -> dict[str, dict[str, float]]:
    """The limits of each key that has some, by its name.

    Args:
        text: as KEY_LIMITS has them.
        names: of all keys.

    Raises: ValueError.
    """
    given = dict[str, dict[str, float]]()
    for entry in text.split(",") if text else ():
        name, _, limits = (part.strip() for part in entry.partition(":"))
        pairs = [tuple(map(str.strip, limit.split("="))) for limit in limits.split(";")]
        twice = name in given
        try:
            given[name] = {limit: float(value) for limit, value in pairs}
        except ValueError:
            pairs = []
        if (
            not pairs
            or twice
            or len(given[name]) < len(pairs)
            or not set(given[name]) <= set(LIMITS)
            or not all(0 < value < 1e12 for value in given[name].values())
        ):
            raise ValueError(
                f"KEY_LIMITS={text!r}; it takes name:limit=number;limit=number for several keys, "
                f"comma-separated, with limits of {', '.join(LIMITS)}"
            )
    if unknown := sorted(set(given) - set(names) - {"*"}):
        raise ValueError(
            f"KEY_LIMITS names {', '.join(map(repr, unknown))}; the keys are named "
            f"{', '.join(sorted(names))}; `*` is for all without limits of their own"
        )
    others = given.pop("*", None)
    return given if others is None else {name: given.get(name, others) for name in names}


def why_unsafe(keys: Collection[str], hosts: Iterable[str]) -> str | None:
    """Why a service that listens on these addresses may not have these keys: the default one, and
    one that can be guessed, are for this machine alone.
    """
    reached = [host for host in hosts if not _is_loopback(host)]
    if not reached:
        return None
    if DEFAULT_KEY in keys:
        what = "is the default, which everybody knows"
    elif any(len(key) < SHORT_KEY for key in keys):
        what = f"has a key of under {SHORT_KEY} characters, which can be guessed"
    else:
        return None
    return f"{what}, and others can reach {reached[0]}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
