"""The CPU families that our own engine has kernels for: one C file each, named like the family."""

import ctypes
import functools
import platform
from dataclasses import dataclass

from engine.bundle import Precision


@dataclass(frozen=True)
class Family:
    name: str  # of the C file, of the table that it exports, and for ENCODER_ISA
    compiler: str  # zig's -mcpu
    needs: frozenset[str]  # names of instruction sets in /proc/cpuinfo
    precisions: tuple[Precision, ...]


_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_VNNI = _AVX512 | {"avx512_vnni"}
_BF16 = _VNNI | {"avx512_bf16"}
_V4_BF16 = "x86_64_v4+avx512vnni+avx512bf16"
_TILES = "+amx_tile+amx_bf16+amx_int8"

# The later of two that this CPU has is the faster, at the precisions that it has.
FAMILIES = (
    Family("portable", "x86_64", frozenset(), ("fp32", "int8")),
    Family("avx2", "x86_64_v3", _AVX2, ("fp32", "int8")),
    Family("avxvnni", "x86_64_v3+avxvnni", _AVX2 | {"avx_vnni"}, ("int8",)),
    Family("avx512", "x86_64_v4", _AVX512, ("fp32", "int8")),
    Family("vnni", "x86_64_v4+avx512vnni", _VNNI, ("int8",)),
    Family("bf16", _V4_BF16, _BF16, ("bf16", "int8")),
    Family("amx", f"{_V4_BF16}{_TILES}", _BF16 | set(_TILES[1:].split("+")), ("bf16", "int8")),
)
NAMES = tuple(family.name for family in FAMILIES)


def runnable(limit: str = "auto") -> list[Family]:
    """The families that this CPU can run, up to the one named `limit`, the fastest last."""
    if platform.machine() != "x86_64":
        return []
    flags = _cpu_flags()
    if "amx_tile" in flags and not _tiles_allowed():
        flags.remove("amx_tile")
    below = FAMILIES if limit == "auto" else FAMILIES[: NAMES.index(limit) + 1]
    return [family for family in below if family.needs <= flags]


def fastest(precision: Precision, limit: str = "auto") -> Family | None:
    """The family to compute with at a precision. The portable one only if `limit` names it: it is
    for tests, and OpenVINO is faster.
    """
    for family in reversed(runnable(limit)):
        if precision in family.precisions and (family.needs or family.name == limit):
            return family
    return None


def slow_at_bf16() -> bool:
    """Whether the CPU computes faster in fp32 than in bf16. Intel's AVX512-BF16 has half the speed
    of its fp32 (measured on Emerald Rapids: 3,700 and 6,100 tokens/s of MiniLM); AMX has not.
    """
    family = fastest("bf16")
    return family is not None and family.name == "bf16" and "GenuineIntel" in _cpuinfo("vendor_id")


def quick_at_int8(limit: str = "auto") -> bool:
    """Whether int8 is the fastest precision. AVX-512 without VNNI multiplies pairs of 16 bits,
    which is not faster than fp32 (measured: 6,000 and 6,500 tokens/s of MiniLM).
    """
    family = fastest("int8", limit)
    return family is not None and family.name != "avx512"


@functools.cache
def _tiles_allowed() -> bool:
    """Ask Linux for AMX's registers, which a process has to do once (its source:
    Documentation/arch/x86/xstate.rst). gVisor, for example, does not give them.
    """
    arch_prctl, request, tiles = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request, tiles) == 0)


def _cpu_flags() -> set[str]:
    """The instruction sets of this CPU that the kernel lets programs use."""
    return set(_cpuinfo("flags").split())


def _cpuinfo(field: str) -> str:
    """The line of the first CPU; empty where there is none."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
            return next((line for line in lines if line.startswith(field)), "")
    except OSError:
        return ""
