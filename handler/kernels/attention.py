"""What attention of one new token and of several have in common."""

import torch

from .cpu import has_code_for, lanes
from .machine_code import Code, Place, Value

_FEW_COLUMNS = 1024  # one thread is quick enough with; where more are, each half of the threads has something to do
LEAST = torch.finfo(torch.bfloat16).min  # a hidden score: not infinite, so that who sees nothing gets numbers


def is_taken(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> bool:
    """Whether code of ours can read these. query [rows, heads, new, size], key and value [rows, kv heads, columns,
    size], mask [rows or 1, 1, new, columns or more], bias [rows * heads, 1, columns]."""
    rows, heads, new, size = query.shape
    kv_heads, columns = key.shape[1:3]
    return (
        0 not in (rows, kv_heads, columns)
        and has_code_for(query.dtype)
        and size % lanes() == 0
        and key.shape == value.shape == (rows, kv_heads, columns, size)
        and heads % kv_heads == 0
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and query.device.type == key.device.type == value.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype
        and (mask is None or _is_one_for_all_heads(mask, query.dtype, rows, new, columns))
        and (bias is None or _is_for_each_head(bias, query.dtype, rows * heads, columns))
    )


def is_enough(items: int, columns: int) -> bool:
    """Whether threads that take so many items in turns are through soon enough."""
    return columns <= _FEW_COLUMNS or 2 * items >= torch.get_num_threads()


def visible(code: Code, mask: Place, within: Value) -> Value:
    """In which lanes a mask, booleans or what is to be added, does not hide; in none that are not within."""
    if mask.dtype == torch.bool:
        return mask.booleans(within)
    return code.where(within, mask.floats(within), code.number(LEAST)) > torch.finfo(mask.dtype).min / 2


def _is_one_for_all_heads(mask: torch.Tensor, dtype: torch.dtype, rows: int, new: int, columns: int) -> bool:
    shape = tuple(mask.shape)
    is_whole = shape[0] in (1, rows) and shape[1:3] == (1, new) and shape[3] >= columns and mask.stride(3) == 1
    return is_whole and mask.dtype in (torch.bool, dtype) and mask.device.type == "cpu"


def _is_for_each_head(bias: torch.Tensor, dtype: torch.dtype, heads: int, columns: int) -> bool:
    return bias.dtype == dtype and bias.shape == (heads, 1, columns) and bias.device.type == "cpu"
