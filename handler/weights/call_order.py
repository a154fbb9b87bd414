"""Which matrices of a model are multiplied by the same tensor one after the other: queries, keys and values; the two of
a gated MLP. And which products go to an activation function as they are. It is found by watching a model without
weights run, whatever its modules are called."""

import copy
import logging
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from handler.weights.quantized import matrices

logger = logging.getLogger(__name__)


class Call(NamedTuple):
    """Of a linear layer, or of a module that has no parameters.

    version: how often its input had been changed. output: of a linear layer.
    """

    name: str
    input: torch.Tensor
    version: int
    output: torch.Tensor | None


@torch.no_grad()  # not inference mode, where tensors do not count their changes
def watch(model: PreTrainedModel) -> list[Call]:
    """Calls in a forward, in their order; none of a model whose code cannot run without numbers, or with outputs that
    have gaps between rows."""
    calls: list[Call] = []

    def watched(name: str, is_linear: bool):
        def hook(module, args, output):
            if is_linear:
                output = torch.cat([output, output], dim=-1)[..., : output.shape[-1]]
            if args and isinstance(args[0], torch.Tensor):
                calls.append(Call(name, args[0], args[0]._version, output if is_linear else None))
            return output

        return hook

    # As attention uses a mask: at the numbers of any other most models would look. BLOOM and OPT count in it.
    mask = torch.zeros(2, 1, 3, 3, dtype=torch.bfloat16, device="meta")
    for attention_mask in (mask, None):
        calls.clear()
        try:
            with torch.device("meta"):
                twin = type(model)(copy.deepcopy(model.config)).bfloat16().eval()  # what experts want on this device
            linear = [n for n in matrices(twin, None) if not isinstance(twin.get_submodule(n), nn.Embedding)]
            functions = [n for n, m in twin.named_modules() if not any(m.children()) and not m._parameters]
            for name in linear + functions:
                twin.get_submodule(name).register_forward_hook(watched(name, name in linear))
            ids = torch.zeros(2, 3, dtype=torch.long, device="meta")
            twin(input_ids=ids, attention_mask=attention_mask, use_cache=False)
            return calls
        except Exception as error:  # of the model's own code
            logger.debug("the order of its products is not known: %s", error)
    return []


def shared_inputs(calls: list[Call]) -> list[list[str]]:
    """Names of linear layers, in the order in which they run, for each tensor that several take in succession and
    unchanged. A layer that runs twice is in no group."""
    calls = [call for call in calls if call.output is not None]
    times = Counter(call.name for call in calls)
    groups: list[list[str]] = []
    before: tuple[torch.Tensor | None, int] = None, 0
    for call in calls:
        once = times[call.name] == 1
        if call.input is before[0] and call.version == before[1] and once:
            groups[-1].append(call.name)
        elif once:
            groups.append([call.name])
        before = call.input if once else None, call.version
    return [group for group in groups if len(group) > 1]


def activations(calls: list[Call]) -> dict[str, str]:
    """Names of linear layers, and of what is called next on their unchanged output, where both run once."""
    times = Counter(call.name for call in calls)
    return {
        one.name: other.name
        for one, other in pairwise(calls)
        if one.output is other.input and not other.version and times[one.name] == times[other.name] == 1
    }
