import pytest
import torch

from handler.kernels.machine_code import has_code_for, lanes

if not lanes():
    collect_ignore_glob = ["test_*"]  # elsewhere PyTorch's operators do it all


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    if not has_code_for(request.param):
        pytest.skip("no bfloat16 here")
    return request.param


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
