"""Compile our own engine: `python -m engine.encoder.build` makes encoder.so, on any machine.

The compiler comes from requirements.txt and can target other machines, so that the build stage of
an image can run on another architecture than the image.
"""

import os
import pathlib
import subprocess
import sys
import tempfile

from engine.encoder.library import LIBRARY

# The instructions are those that encoder_engine.py asks for. The glibc is the oldest of any Linux
# for which there are wheels for Python 3.11.
_TARGET = ("-target", "x86_64-linux-gnu.2.28", "-mcpu=x86_64_v4+avx512bf16+avx512vnni")
_OPTIONS = ("-O3", "-shared", "-s", "-lpthread", "-Wall", "-Wextra", "-Werror")


def build(library: pathlib.Path = LIBRARY) -> None:
    """Compile to `library`, which is replaced in one step: a process may have it open.

    Raises: CalledProcessError; the compiler has printed the reason.
    """
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
        made = pathlib.Path(folder) / library.name
        compiler = [sys.executable, "-m", "ziglang", "cc", *_TARGET, *_OPTIONS]
        source = pathlib.Path(__file__).with_name("encoder.c")
        caches = {name: folder for name in ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR")}
        command = [*compiler, "-o", str(made), str(source)]
        subprocess.run(command, env={**os.environ, **caches}, check=True)
        made.replace(library)


if __name__ == "__main__":
    build()
