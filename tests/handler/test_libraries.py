import subprocess
import sys

MISSING = """
names = "torch._dynamo.utils", "torch._inductor", "torch.distributed.tensor", "sympy"
assert not (there := [name for name in names if name in sys.modules]), there
"""
COMPILE = """
compiled = torch.compile(lambda x: x + 1, backend="eager", fullgraph=True)
assert compiled(torch.ones(2)).tolist() == [2, 2]
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
dynamo = sys.modules["torch._dynamo"]
assert dynamo.__file__
for name in "utils", "config", "_trace_wrapped_higher_order_op":
    module = sys.modules["torch._dynamo." + name]
    assert module is getattr(dynamo, name) and module.__spec__.origin == module.__file__, module
"""
WANTED = (
    "import torch._dynamo.config",
    "from torch._dynamo.backends.registry import list_backends",
    "import importlib.util; assert importlib.util.find_spec('torch._dynamo.utils')",
    "import torch._dynamo as early; early.reset(); assert early.disable is sys.modules['torch._dynamo'].disable",
)
LACKING = """
try:
    import torch._dynamo.nothing
except ModuleNotFoundError as error:
    assert error.name == "torch._dynamo.nothing"
else:
    raise AssertionError
"""
THREADS = f"""
import threading
errors = []
def use():
    try:
        torch._dynamo.reset()
    except BaseException as error:
        errors.append(error)
threads = [threading.Thread(target=use, daemon=True) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(120)
assert not errors and not any(thread.is_alive() for thread in threads), errors
{COMPILE}
"""
BROKEN = """
sys.modules["torch._dynamo.utils"] = None
for _ in range(2):
    try:
        torch._dynamo.reset
    except ImportError:
        pass
    else:
        raise AssertionError
assert torch._dynamo.disable(len) is len
"""


def run(code: str, *arguments: str) -> None:
    """In a process of its own, as a worker is: this one has imported all of transformers."""
    done = subprocess.run([sys.executable, "-c", "import sys\n" + code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_worker_has_no_compilers(bloom, tmp_path):
    run(
        f"""
import handler.service
{MISSING}
import torch
from pathlib import Path
from handler.engine import Engine
from handler.loading import load_model
from handler.settings import Settings
loaded = load_model(Path(sys.argv[1]), Settings(), Path(sys.argv[2]))
Engine(loaded.model, loaded.tokenizer, Settings())
{MISSING}
assert 0.5 < torch.nn.Embedding(100, 8).weight.std() < 2
assert 0.1 < torch.nn.Linear(8, 100).weight.std() < 0.3 and torch.nn.Linear(8, 100).bias.std() > 0.1
assert torch._dynamo.disable(fn=len) is len and torch._dynamo.disable(reason="")(len) is len
import importlib.util
assert importlib.util.find_spec("torch._dynamo").origin.endswith("__init__.py")
from transformers.utils import is_torch_distributed_available
assert torch.distributed.is_available() and not is_torch_distributed_available()
from torch.distributed.tensor import DTensor
{COMPILE}
""",
        str(bloom),
        str(tmp_path),
    )


def test_who_wants_more_of_dynamo_has_all_of_it_once():
    codes = [f"{MISSING}{wanted}\n{COMPILE}" for wanted in WANTED] + [LACKING, THREADS, BROKEN]
    run(
        f"""
import os
import torch
import handler.libraries
for code in {codes!r}:
    if child := os.fork():  # each begins with what was imported above
        assert os.waitpid(child, 0)[1] == 0, code
        continue
    exec(code, globals())
    break
"""
    )


def test_where_dynamo_was_imported_it_stays():
    run(
        """
import torch._dynamo
dynamo = sys.modules["torch._dynamo"]
import handler.libraries
assert sys.modules["torch._dynamo"] is dynamo
"""
    )


def test_all_models_have_their_names():
    run(
        """
import handler.libraries
from transformers import models
from transformers.utils import import_utils
for function in (import_utils.define_import_structure, import_utils.create_import_structure_from_path):
    function.cache_clear()
structure = import_utils.define_import_structure(models.__file__)
names = {name for modules in structure.values() for names in modules.values() for name in names}
assert len(names) > 1000 and names <= set(dir(models)), names - set(dir(models))
"""
    )
