"""The results as rows, and the rows as a Markdown table, as JSON and as a plot."""

import datetime
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from loadtest.rounds import Side, alternate, combine, doubt, ratio

Row = dict[str, Any]  # all rows of a measurement have the same keys, in the order of its columns

HEADS = {  # of columns; others are called as their keys
    "side": "what",
    "connections": "at a time",
    "rate": "a second",
    "tokens": "tokens/s",
    "served": "served/s",
    "ceiling": "ceiling/s",
    "batch_size": "best batch",
    "p50": "p50 ms",
    "p99": "p99 ms",
    "query_p50": "query p50 ms",
    "query_p99": "query p99 ms",
    "stream_alone": "stream alone/s",
    "stream_beside": "beside queries/s",
    "ready": "to ready s",
    "ready_worst": "worst s",
    "pss": "PSS MiB",
    "rss": "RSS MiB",
    "first": "first request ms",
    "steady": "steady ms",
    "stop": "to exit s",
    "real_tokens": "tokens",
    "padded_tokens": "padded",
    "cpu": "client ms",
}
_SHARES = {"share", "kept", "wasted"}


def compare(
    load: str,
    connections: int,
    sides: Sequence[tuple[str, Side]],
    against: bool,
    seconds: float,
    rounds: int,
) -> list[Row]:
    """A row for each side of its name, measured in alternating rounds: medians over the rounds, and
    with `against` the ratio to the last side.
    """
    title = f"{load}, {connections} at a time"
    runs = alternate(title, [side for _, side in sides], seconds, rounds)
    others, rows = runs[-1] if against else [], []
    for (name, _), results in zip(sides, runs):
        whole = combine(results)
        rows.append(
            {
                "side": name,
                "load": load,
                "connections": connections,
                "rate": whole.rate,
                "p50": whole.p50,
                "p99": whole.p99,
                "failed": whole.failed,
                "ratio": ratio(results, others),
                "cpu": whole.cpu or None,
                "note": doubt(results, others),
            }
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown. Columns that every row leaves at None are dropped."""
    keys = [key for key in rows[0] if any(row[key] is not None for row in rows)]
    lines = ["| " + " | ".join(HEADS.get(key, key) for key in keys) + " |"]
    lines.append("|---" * len(keys) + "|")
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


def plot(rows: Sequence[Row], path: pathlib.Path, title: str) -> None:
    """Throughput and p99 against concurrency by matplotlib (requirements-plot.txt): a row of panels
    for each load, a line for each service or setting of it. A PNG.

    Args:
        title: what was measured, the model and the machine; the date is added.

    Raises: ImportError without matplotlib; OSError when the file cannot be written.
    """
    from matplotlib.figure import Figure  # 0.5 s, and absent where nobody plots

    loads: dict[str, dict[str, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: int(row["connections"])):
        name = str(row.get("side") or row.get("precision"))
        if row.get("cores"):
            name += f", cores {row['cores']}, workers {row['workers']}"
        loads.setdefault(row["load"], {}).setdefault(name, []).append(row)
    names = list(dict.fromkeys(name for lines in loads.values() for name in lines))
    figure = Figure(figsize=(11, 1.5 + 3 * len(loads) + 0.2 * len(names)), layout="constrained")
    figure.suptitle(f"{title}, {datetime.date.today():%Y-%m-%d}")
    panels = figure.subplots(len(loads), 2, squeeze=False)
    drawn = {}
    for (load, lines), pair in zip(loads.items(), panels):
        ticks = sorted({row["connections"] for points in lines.values() for row in points})
        for panel, key, what in zip(pair, ("rate", "p99"), ("per second", "p99, ms")):
            for name, points in lines.items():
                xs, ys = [each["connections"] for each in points], [each[key] for each in points]
                colour = f"C{names.index(name)}"
                (drawn[name],) = panel.plot(xs, ys, marker="o", color=colour)
            panel.set(title=f"{load}: {what}", xscale="log", ylim=(0, None))
            panel.set_xlabel("requests at a time")
            panel.set_xticks(ticks, map(str, ticks))
            panel.minorticks_off()
            panel.grid(axis="y")
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower left")
    figure.savefig(path, format="png")
