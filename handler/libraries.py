"""Imports transformers and Accelerate without what only compiled models and several processes need, and keeps PyTorch
from drawing numbers for tensors that have no data.

That is a third of the modules which they bring, and 40 MB. Both libraries then take this PyTorch for one that cannot
distribute, for as long as the process lives. Who wants more of torch._dynamo than marks on functions gets it, but what
was marked before is not.
"""

import functools
import gc
import importlib
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

_DYNAMO = "torch._dynamo"
_MASKS = "_trace_wrapped_higher_order_op"  # the one module of it that transformers wants, which needs no other
_MARKS = ("disable", "allow_in_graph", "assume_constant_result")
_taking = threading.Lock()


def _as_it_is(fn: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Callable[..., Any]:
    return _as_it_is if fn is None else fn


class _Uncompiled(ModuleType):
    """In torch._dynamo's place until more of it is wanted than marks on functions, which here do nothing.

    PyTorch imports it for those marks alone, on the first call of many an operator on meta tensors, for instance.
    """

    def __init__(self) -> None:
        super().__init__(_DYNAMO)
        self.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]
        self.__spec__ = PathFinder.find_spec(_DYNAMO, [str(Path(torch.__file__).parent)])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _MARKS and sys.modules.get(_DYNAMO) is self:
            return _as_it_is
        return getattr(_real_dynamo(), name)


class _Modules(MetaPathFinder, Loader):
    """Puts the real one in that place when a module of it is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        replaced = isinstance(sys.modules.get(_DYNAMO), _Uncompiled)
        ours = replaced and name.startswith(f"{_DYNAMO}.") and not name.endswith(f".{_MASKS}")
        return ModuleSpec(name, self) if ours else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The one that the real one has imported, so that it is not executed twice."""
        _real_dynamo()
        module = importlib.import_module(spec.name)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ and module.__spec__.loader is self:  # torch._dynamo.config lets nobody set it
            module.__spec__ = module.__spec__.loader_state


def _real_dynamo() -> ModuleType:
    with _taking:
        stand_in = sys.modules.pop(_DYNAMO) if isinstance(sys.modules.get(_DYNAMO), _Uncompiled) else None
    try:
        dynamo = importlib.import_module(_DYNAMO)  # waits for a thread that does so already
    except BaseException:
        if stand_in:
            sys.modules.setdefault(_DYNAMO, stand_in)
        raise
    if masks := sys.modules.get(f"{_DYNAMO}.{_MASKS}"):
        setattr(dynamo, _MASKS, masks)
    return dynamo


def _import_models() -> None:
    """transformers.models, which for its names reads all of its files, as transformers itself did just before."""
    from transformers.utils import import_utils

    models = Path(import_utils.__file__).parents[1] / "models"
    known = import_utils.create_import_structure_from_path(models)  # remembered
    with patch.object(import_utils, "create_import_structure_from_path", return_value=known):
        import transformers.models  # noqa: F401


def _unless_meta(fill: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """On the meta device there are no numbers to draw. PyTorch would import sympy for that, half a thousand modules."""
    return functools.wraps(fill)(lambda tensor, *of, **how: tensor if tensor.is_meta else fill(tensor, *of, **how))


for _name in "normal_", "uniform_", "kaiming_uniform_":  # what embeddings and linear layers are born with
    setattr(torch.nn.init, _name, _unless_meta(getattr(torch.nn.init, _name)))
if _DYNAMO not in sys.modules:
    sys.modules[_DYNAMO] = _Uncompiled()
    sys.meta_path.insert(0, _Modules())
gc.disable()  # each collection would look through all that was imported
with patch.object(torch.distributed, "is_available", return_value=False):
    _import_models()
    import accelerate  # noqa: F401
    import transformers.generation.utils
    import transformers.modeling_utils  # noqa: F401
gc.enable()
