"""For a machine with torch 2.11, whose `varlen_attn` has no `enable_gqa`: it takes fewer key heads
without being told. Put this folder on PYTHONPATH; a newer torch is left as it is.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

NAME = "torch.nn.attention.varlen"


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        theirs = module.varlen_attn
        if "enable_gqa" not in inspect.signature(theirs).parameters:

            def varlen_attn(*args: Any, enable_gqa: bool = False, **options: Any) -> Any:
                return theirs(*args, **options)

            setattr(module, "varlen_attn", varlen_attn)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != NAME:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None:
            spec.loader = _Loader(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
