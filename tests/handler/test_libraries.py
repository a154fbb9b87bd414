import os
import subprocess
import sys

import pytest

MISSING = """
names = "torch._dynamo.utils", "torch._inductor", "torch.distributed.tensor"
assert not (there := [name for name in names if name in sys.modules]), there
"""
COMPILE = """
compiled = torch.compile(lambda x: x + 1, backend="eager", fullgraph=True)
assert compiled(torch.ones(2)).tolist() == [2, 2]
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
assert sys.modules["torch._dynamo"].__file__
"""


def run(code: str, *arguments: str) -> None:
    """In a process of its own, as a worker is: this one has imported all of transformers."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + code, *arguments], env=environment, capture_output=True, text=True
    )
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
assert torch.distributed.is_available()
from torch.distributed.tensor import DTensor
{COMPILE}
""",
        str(bloom),
        str(tmp_path),
    )


@pytest.mark.parametrize(
    "wanted",
    [
        "",
        "import torch._dynamo.utils",
        "from torch._dynamo import config",
        "from torch._dynamo.backends.registry import list_backends",
        "assert torch._dynamo.disable(len) is len and torch._dynamo.disable(reason='')(len) is len",
    ],
)
def test_who_wants_more_of_dynamo_has_all_of_it_once(wanted):
    run(f"import torch, handler.libraries\n{MISSING}{wanted}\n{COMPILE}")


def test_a_module_that_dynamo_lacks():
    run(
        """
import handler.libraries
try:
    import torch._dynamo.nothing
except ModuleNotFoundError as error:
    assert error.name == "torch._dynamo.nothing"
else:
    raise AssertionError
"""
    )


def test_where_dynamo_was_imported_it_stays():
    run("import torch._dynamo\ndynamo = torch._dynamo\nimport handler.libraries\nassert torch._dynamo is dynamo")


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
