"""Trains and bakes in one process what conftest.py shares: `python tests/bakes.py COMMANDS`, a JSON
list. Each command is ["train", FOLDER] (tests/tiny_clip.py), or ["bake", OPTIONS…] or ["bake few",
OPTIONS…] (bake_model.py), where the certificates are over FEW texts instead of 120.
"""

import json
import pathlib
import sys
from unittest import mock

TESTS = pathlib.Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import tiny_clip  # noqa: E402

import bake_model  # noqa: E402

FEW = 24

for first, *more in json.loads(sys.argv[1]):
    if first == "train":
        tiny_clip.save(pathlib.Path(more[0]))
    elif first == "bake few":
        with mock.patch("bake.stages.TEXTS", FEW):
            bake_model.main(more)
    else:
        bake_model.main(more)
