"""Which matrices of a model are multiplied by the same tensor one after the other: queries, keys and values; the two of
a gated MLP. It is found by watching a model without weights run, whatever its modules are called."""

import copy
import logging

import torch
from torch import nn
from transformers import PreTrainedModel

from handler.weights.quantized import matrices

logger = logging.getLogger(__name__)


@torch.no_grad()  # not inference mode, where tensors do not count their changes
def shared_inputs(model: PreTrainedModel) -> list[list[str]]:
    """Names of linear layers, in the order in which they run, for each tensor that several take in succession and
    unchanged. None of a model whose code cannot run without numbers, or with outputs that have gaps between rows."""
    calls: list[tuple[str, torch.Tensor, int]] = []

    def watched(name: str):
        def hook(module, args, output):
            calls.append((name, args[0], args[0]._version))
            return torch.cat([output, output], dim=-1)[..., : output.shape[-1]]

        return hook

    try:
        with torch.device("meta"):
            twin = type(model)(copy.deepcopy(model.config)).bfloat16().eval()  # what experts want on this device
        for name in matrices(twin, None):
            if not isinstance(module := twin.get_submodule(name), nn.Embedding):
                module.register_forward_hook(watched(name))
        ids = torch.zeros(2, 3, dtype=torch.long, device="meta")
        # As attention uses it: at the numbers of any other the library would look.
        mask = torch.zeros(2, 1, 3, 3, dtype=twin.dtype, device="meta")
        twin(input_ids=ids, attention_mask=mask, use_cache=False)
    except Exception as error:  # of the model's own code
        logger.debug("inputs that products share are not known: %s", error)
        return []
    return [group for group in _in_succession(calls) if len(group) > 1]


def _in_succession(calls: list[tuple[str, torch.Tensor, int]]) -> list[list[str]]:
    """calls: of a layer, its input and how often that has been changed. A layer that runs twice is in no group."""
    names = [name for name, *_ in calls]
    groups: list[list[str]] = []
    before: tuple[torch.Tensor | None, int] = None, 0
    for name, tensor, version in calls:
        if tensor is before[0] and version == before[1] and names.count(name) == 1:
            groups[-1].append(name)
        elif names.count(name) == 1:
            groups.append([name])
        before = tensor if names.count(name) == 1 else None, version
    return groups
