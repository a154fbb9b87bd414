"""Imports transformers and Accelerate without what only compiled models and several processes need.

That is a third of the modules which they bring, and 40 MB. Who asks for torch.distributed.tensor later gets it, and so
for torch._dynamo, but that what was marked for it before is not.
"""

import gc
import importlib
import sys
from collections.abc import Callable, MutableSequence, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

_DYNAMO = "torch._dynamo"
_STANDS_ALONE = f"{_DYNAMO}._trace_wrapped_higher_order_op"  # what makes masks wants this one module of it


def _as_it_is(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Callable[..., Any]:
    return function or _as_it_is


class _Uncompiled(ModuleType):
    """In torch._dynamo's place until more of it is wanted than marks on functions, which here do nothing.

    PyTorch imports it for those marks alone, on the first call of many an operator on meta tensors, for instance.
    """

    __path__: MutableSequence[str] = []
    disable = allow_in_graph = assume_constant_result = staticmethod(_as_it_is)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_real_dynamo(), name)


class _Modules(MetaPathFinder, Loader):
    """Finds the modules in it: with the real one."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith(f"{_DYNAMO}.") or not isinstance(sys.modules.get(_DYNAMO), _Uncompiled):
            return None
        if name == _STANDS_ALONE:
            return PathFinder.find_spec(name, [str(Path(torch.__file__).parent / "_dynamo")])
        _real_dynamo()
        self._found = importlib.import_module(name)
        self._own_spec = self._found.__spec__
        del sys.modules[name]  # or else its own spec is taken, and executed once more
        return ModuleSpec(name, self)

    def create_module(self, _: ModuleSpec) -> ModuleType:
        return self._found

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own_spec


def _real_dynamo() -> ModuleType:
    if isinstance(sys.modules.get(_DYNAMO), _Uncompiled):
        del sys.modules[_DYNAMO]
    return importlib.import_module(_DYNAMO)


def _import_models() -> None:
    """transformers.models, which for its names reads all of its files, as transformers itself did just before."""
    from transformers.utils import import_utils

    models = Path(import_utils.__file__).parents[1] / "models"
    known = import_utils.create_import_structure_from_path(models)  # remembered
    with patch.object(import_utils, "create_import_structure_from_path", return_value=known):
        import transformers.models  # noqa: F401


if _DYNAMO not in sys.modules:
    sys.modules[_DYNAMO] = _Uncompiled(_DYNAMO)
    sys.meta_path.insert(0, _Modules())
gc.disable()  # each collection would look through all that was imported
with patch.object(torch.distributed, "is_available", return_value=False):
    _import_models()
    import accelerate  # noqa: F401
    import transformers.generation.utils
    import transformers.modeling_utils  # noqa: F401
gc.enable()
