"""The machine that is measured on: its processor, and how busy others keep it meanwhile."""

import contextlib
import os
import pathlib
import time
from typing import NamedTuple

from settings import available_cores

BUSY = 0.05  # share of the cores that others may take before it is called busy


def machine() -> str:
    """The processor and how many cores of it may be used."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'}, {available_cores()} cores"


class Ticks(NamedTuple):
    """Processor time so far, in seconds."""

    at: float
    busy: float  # of all processes on the cores that this one may use
    stolen: float  # that the host gave to other machines
    own: float  # of this process and those it started that have ended
    load: float  # processes that run or want to, as a mean over the last minute


def ticks() -> Ticks:
    """As /proc/stat has it; without it nothing was used."""
    hertz, busy, stolen = os.sysconf("SC_CLK_TCK"), 0, 0
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in pathlib.Path("/proc/stat").read_text().splitlines():
            name, *fields = line.split()
            if name in cores:
                user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
                busy += user + nice + system + irq + softirq
                stolen += steal
    own = sum(os.times()[:4])
    return Ticks(time.monotonic(), busy / hertz, stolen / hertz, own, os.getloadavg()[0])


class Usage:
    """What others did with the machine's cores between two readings."""

    def __init__(self, before: Ticks, after: Ticks) -> None:
        """`after`: once all processes have ended that this one started, else they are others."""
        seconds, own = max(after.at - before.at, 0.01), after.own - before.own
        self._loads = before.load, after.load
        self.stolen = (after.stolen - before.stolen) / seconds  # cores
        self.others = max(0.0, after.busy - before.busy - own) / seconds

    @property
    def busy(self) -> bool:
        return self.others + self.stolen > BUSY * len(os.sched_getaffinity(0))

    def __str__(self) -> str:
        before, after = self._loads
        return (
            f"load {before:.1f} before and {after:.1f} after; other processes took "
            f"{self.others:.2f} of {len(os.sched_getaffinity(0))} cores, the host "
            f"{self.stolen:.2f} (steal)"
        )
