"""Throughput and p99 against concurrency, drawn with matplotlib (requirements-plot.txt)."""

import pathlib
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[int, float, float]]  # connections, units a second, p99 in ms


def plot(series: Mapping[str, Points], path: pathlib.Path) -> None:
    """Two panels side by side, a line for each series, the legend below; a PNG.

    Raises: ImportError without matplotlib; OSError when the file cannot be written.
    """
    from matplotlib.figure import Figure  # 0.5 s, and absent where nobody plots

    figure = Figure(figsize=(11, 4 + 0.25 * len(series)), layout="constrained")
    panels = figure.subplots(1, 2)
    ticks = sorted({connections for points in series.values() for connections, _, _ in points})
    for column, (panel, title) in enumerate(zip(panels, ("a second", "p99, ms")), 1):
        for name, points in series.items():
            xs, ys = [point[0] for point in points], [point[column] for point in points]
            panel.plot(xs, ys, marker="o", label=name)
        panel.set(title=title, xlabel="connections", xscale="log", ylim=(0, None))
        panel.set_xticks(ticks, map(str, ticks))
        panel.minorticks_off()
        panel.grid(axis="y")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left")
    figure.savefig(path, format="png")
