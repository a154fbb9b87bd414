"""Norms of the models, in one pass: of RMS norms the library makes six operators."""

from collections.abc import Callable

import torch
from torch import nn

from handler.kernels.layer_norm import can_normalize_layer, layer_norm
from handler.kernels.rms_norm import KINDS, can_normalize, rms_norm
from handler.weights.placement import replace_forward

_TRIED_ROWS = 4
_NEAR = {
    torch.float32: 1e-6,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}  # relative: what another order of sums comes to


@torch.inference_mode()
def mend_norms(model: nn.Module) -> int:
    """Let norms in this CPU's memory be computed by kernels; how many. Of RMS norms models have a class each, of a few
    kinds: what a module computes is tried, and one that computes something else is left."""
    mended = 0
    for module in model.modules():
        theirs = getattr(module, "_old_forward", module.forward)  # below Accelerate's hook
        if type(module) is nn.LayerNorm and _is_here(module):
            replace_forward(module, _layer_forward(theirs, module))
            mended += 1
        weight, epsilon = module._parameters.get("weight"), getattr(module, "variance_epsilon", None)
        epsilon = getattr(module, "eps", None) if epsilon is None else epsilon
        if not type(module).__name__.endswith("RMSNorm") or weight is None or not isinstance(epsilon, float):
            continue
        if (kind := _kind(module, weight, epsilon)) is not None:
            replace_forward(module, _forward(theirs, weight, epsilon, kind))
            mended += 1
    return mended


def _is_here(module: nn.LayerNorm) -> bool:
    weight, bias = module.weight, module.bias
    return weight is not None and bias is not None and can_normalize_layer(weight, weight, bias)


def _layer_forward(theirs: Callable, module: nn.LayerNorm) -> Callable:
    weight, bias, epsilon = module.weight, module.bias, module.eps

    def forward(input: torch.Tensor) -> torch.Tensor:
        if not can_normalize_layer(input, weight, bias):
            return theirs(input)
        return layer_norm(input, weight, bias, epsilon)

    return forward


def _kind(module: nn.Module, weight: nn.Parameter, epsilon: float) -> str | None:
    """Which kind the module is, by what it makes of numbers of different size, [1, rows, size]."""
    tried = torch.arange(_TRIED_ROWS * weight.numel()).sin().view(1, _TRIED_ROWS, -1)
    tried = (tried * torch.logspace(-4, 2, _TRIED_ROWS).unsqueeze(1)).to(weight.dtype)
    if not can_normalize(tried, weight):
        return None
    try:
        expected = module(tried)
    except Exception:  # of code that may be anyone's: it wants other things
        return None
    if not isinstance(expected, torch.Tensor) or expected.dtype != tried.dtype or expected.shape != tried.shape:
        return None
    outputs = {kind: rms_norm(tried, weight, epsilon, kind) for kind in KINDS}
    kind = max(KINDS, key=lambda kind: (outputs[kind] == expected).sum().item())
    return kind if torch.allclose(outputs[kind], expected, rtol=_NEAR[weight.dtype], atol=0) else None


def _forward(theirs: Callable, weight: nn.Parameter, epsilon: float, kind: str) -> Callable:
    def forward(*given, **options) -> torch.Tensor:
        if options or len(given) != 1 or not can_normalize(given[0], weight):
            return theirs(*given, **options)
        return rms_norm(given[0], weight, epsilon, kind)

    return forward
