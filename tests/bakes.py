"""Trains and bakes in one process what conftest.py shares: `python tests/bakes.py COMMANDS`, a JSON
list. Each command is ["train", FOLDER] (tests/tiny_clip.py), ["sample", COUNT], which says how many
texts are compared in the bakes after it, or a list of bake_model.py's options.
"""

import json
import pathlib
import sys

TESTS = pathlib.Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import tiny_clip  # noqa: E402

import bake_model  # noqa: E402
from bake import stages  # noqa: E402

for first, *more in json.loads(sys.argv[1]):
    if first == "train":
        tiny_clip.save(pathlib.Path(more[0]))
    elif first == "sample":
        stages.TEXTS = int(more[0])
    else:
        bake_model.main([first, *more])
