"""The results as rows, and the rows as a Markdown table, as JSON, and as the lines of a plot."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from loadtest.client import Result
from loadtest.rounds import combine, ratio
from settings import available_cores

Row = dict[str, Any]  # the keys of HEADS

HEADS = {  # in the order of a table's columns
    "side": "what",
    "precision": "precision",
    "cores": "cores",
    "workers": "workers",
    "load": "load",
    "connections": "at a time",
    "rate": "a second",
    "tokens": "tokens/s",
    "served": "served/s",
    "ceiling": "ceiling/s",
    "share": "share",
    "batch_size": "best batch",
    "alone": "alone/s",
    "share_alone": "share of alone",
    "p50": "p50 ms",
    "p99": "p99 ms",
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
    "real_tokens": "tokens",
    "padded_tokens": "padded",
    "wasted": "wasted",
    "failed": "failed",
    "ratio": "ratio",
    "cpu": "client ms",
}
_SHARES = {"share", "share_alone", "kept", "wasted"}


def row(
    side: str, load: str, connections: int, results: Sequence[Result], others: Sequence[Result]
) -> Row:
    """Medians over rounds, and the ratio to `others`, the other side's results."""
    whole = combine(results)
    return {
        "side": side,
        "load": load,
        "connections": connections,
        "rate": whole.rate,
        "p50": whole.p50,
        "p99": whole.p99,
        "failed": whole.failed + sum(other.failed for other in others),
        "ratio": ratio(results, others),
        "cpu": whole.cpu or None,
    }


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
    keys = [key for key in HEADS if any(row.get(key) is not None for row in rows)]
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


def series(rows: Sequence[Row]) -> dict[str, list[tuple[int, float, float]]]:
    """Rows with rate and p99 at several connections, as `plot` takes them: a line for each load and
    setting of the service.
    """
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for row in rows:
        parts = [row.get("side") or row.get("precision"), row["load"]]
        if row.get("cores"):
            parts.append(f"cores {row['cores']}, workers {row['workers']}")
        points = lines.setdefault(", ".join(parts), [])
        points.append((row["connections"], row["rate"], row["p99"]))
    return {name: sorted(points) for name, points in lines.items()}
