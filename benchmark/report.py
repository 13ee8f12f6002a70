"""What was measured, as a table to paste, as JSON, as a picture; and how far it is."""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from settings import available_cores

Row = dict[str, Any]  # the keys of HEADS

HEADS = {
    "side": "what",
    "load": "load",
    "connections": "at a time",
    "rate": "a second",
    "tokens": "tokens/s",
    "p50": "p50 ms",
    "p99": "p99 ms",
    "failed": "failed",
    "ratio": "ratio",
    "cpu": "client ms",
    "served": "served/s",
    "ceiling": "ceiling/s",
    "share": "share",
    "alone": "alone/s",
    "share_alone": "share of alone",
    "batch_size": "best batch",
    "queries": "queries",
    "query_p50": "query p50 ms",
    "query_p99": "query p99 ms",
    "query_alone_p50": "alone p50 ms",
    "stream_alone": "stream alone/s",
    "stream_beside": "beside queries/s",
    "kept": "kept",
    "starts": "starts",
    "ready": "to ready s",
    "ready_worst": "worst s",
    "pss": "PSS MiB",
    "rss": "RSS MiB",
    "first": "first request ms",
    "steady": "steady ms",
    "stop": "to exit s",
    "padded_tokens": "padded tokens",
    "wasted": "wasted",
    "cores": "cores",
    "workers": "workers",
    "precision": "precision",
}
_SHARES = {"share", "share_alone", "kept", "wasted"}


class Progress:
    """Says on stderr which of how many measurements runs."""

    def __init__(self, total: int) -> None:
        self.done, self.total = 0, total

    def __call__(self, what: str) -> None:
        self.done += 1
        line, wipe = f"[{self.done}/{self.total}] {what}", sys.stderr.isatty()
        print(f"\r\x1b[K{line}" if wipe else line, end="" if wipe else "\n", file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr)


def machine() -> str:
    """The processor and how many cores of it may be used."""
    name = "unknown processor"
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name}, {available_cores()} cores"


def table(rows: Sequence[Row]) -> str:
    """Markdown. Columns that every row leaves at None are dropped."""
    keys = [key for key in rows[0] if any(row[key] is not None for row in rows)]
    lines = ["| " + " | ".join(HEADS[key] for key in keys) + " |", "|---" * len(keys) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(_cell(key, row[key]) for key in keys) + " |")
    return "\n".join(lines)


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key in _SHARES:
        return f"{100 * value:.1f} %"
    if isinstance(value, float):
        digits = 2 if value < 10 else 1 if value < 1000 else 0
        return f"{value:.{digits}f}"
    return str(value)


def as_json(what: str, conditions: str, rows: Sequence[Row], **more: Any) -> str:
    rounded = [
        {key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()} for row in rows
    ]
    whole = {"what": what, "conditions": conditions, "rows": rounded, **more}
    return json.dumps(whole, indent=1)
