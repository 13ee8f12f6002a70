"""Compile our own engine: `python -m engine.encoder.build` makes encoder.so, on any machine.

The compiler comes from requirements.txt and can target other machines, so that the build stage of
an image can run on another architecture than the image.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

from engine.encoder.cpu import FAMILIES
from engine.encoder.library import LIBRARY

# The glibc is the oldest of any Linux for which there are wheels for Python 3.11.
_TARGET = ("-target", "x86_64-linux-gnu.2.28")
# `a * b + c` may be one instruction. So may a minimum or maximum: with the rules for NaN it takes
# three, which costs 10 % at int8 and 20 % with AMX. Activations are read as 32 bits that may be one
# float32 or two bf16.
_ARITHMETIC = ("-ffp-contract=fast", "-fno-honor-nans", "-fno-strict-aliasing")
_OPTIONS = ("-O3", "-fPIC", "-D_GNU_SOURCE", *_ARITHMETIC)
_WARNINGS = ("-Wall", "-Wextra", "-Werror")
_BASE = ("crew", "model", "batches", "structures")  # for every CPU


def build(library: pathlib.Path = LIBRARY) -> None:
    """Compile to `library`, which is replaced in one step: a process may have it open.

    Raises: CalledProcessError; the compiler has printed the reason.
    """
    sources = pathlib.Path(__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
        caches = {name: folder for name in ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR")}
        compiler = [sys.executable, "-m", "ziglang", "cc", *_TARGET]

        def run(*options: str) -> None:
            subprocess.run([*compiler, *options], env={**os.environ, **caches}, check=True)

        cpus = {name: "x86_64" for name in _BASE} | {each.name: each.compiler for each in FAMILIES}
        objects = [str(pathlib.Path(folder) / f"{name}.o") for name in cpus]

        def compile_one(name: str, made: str) -> None:
            source = str(sources / f"{name}.c")
            run(f"-mcpu={cpus[name]}", *_OPTIONS, *_WARNINGS, "-c", source, "-o", made)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, cpus, objects))
        linked = pathlib.Path(folder) / library.name
        run("-shared", "-s", "-lpthread", *objects, "-o", str(linked))
        linked.replace(library)


if __name__ == "__main__":
    build()
