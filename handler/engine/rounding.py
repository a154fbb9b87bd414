"""How far logits are off, and how far rounding alone takes them."""

import torch
from transformers import PreTrainedModel

# Standard deviations of the logits. Rounding comes to 0.03 in bfloat16, to 0.1 where it changes experts, to 0.0001 in
# float32; a wrong position or a missing token to 0.3 and more.
_ROUNDING, _ROUNDING_FLOAT32 = 0.2, 0.01


def tolerance(model: PreTrainedModel) -> float:
    """In standard deviations of the logits."""
    is_exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    return _ROUNDING_FLOAT32 if is_exact else _ROUNDING


def differences(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """[positions], between logits [positions, vocab], in standard deviations of those that are expected. What all words
    have in common makes no difference, and words that a model blanks out do not count."""
    blank = min(1e9, torch.finfo(expected.dtype).max / 2)
    pairs = zip(logits.float(), expected.float(), strict=True)
    real = [(one[~(other.abs() > blank)], other[~(other.abs() > blank)]) for one, other in pairs]  # what is NaN, too
    return torch.stack([(one - other).std() / other.std() for one, other in real])
