"""Compile engine/encoder.c, for `python -m engine.build`: once, beside the code, on any machine.

The compiler is the one in requirements.txt, and it compiles for other machines as well: an image's
build stage makes what the image runs, whatever it runs on itself.
"""

import os
import pathlib
import subprocess
import sys
import tempfile

from engine.native import LIBRARY

# What every CPU has that engine/native.py lets it run on; and the oldest glibc of any Linux that
# Python 3.11 still has wheels for.
_TARGET = ("-target", "x86_64-linux-gnu.2.28", "-mcpu=x86_64_v4+avx512bf16+avx512vnni")


def build(library: pathlib.Path = LIBRARY) -> None:
    """Compile to `library`, which a process may have open: it is replaced whole.

    Raises: CalledProcessError, after the compiler has said why.
    """
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
        made = pathlib.Path(folder) / library.name
        command = [
            sys.executable,
            "-m",
            "ziglang",
            "cc",
            *_TARGET,
            "-O3",
            "-shared",
            "-s",
            "-lpthread",
        ]
        command += ["-Wall", "-Wextra", "-Werror", "-o", str(made)]
        source = pathlib.Path(__file__).with_name("encoder.c")
        caches = {name: folder for name in ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR")}
        subprocess.run([*command, str(source)], env={**os.environ, **caches}, check=True)
        made.replace(library)


if __name__ == "__main__":
    build()
