"""BLOOM's activation function, in one pass."""

import torch
from transformers import PreTrainedModel
from transformers.models.bloom.modeling_bloom import BloomGelu


def fuse_gelu(model: PreTrainedModel) -> None:
    """Let PyTorch's GELU do what BLOOM's does in eight passes over the activations, rounding after each: the same
    formula, 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (Hendrycks and Gimpel, arXiv:1606.08415)."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, BloomGelu):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
