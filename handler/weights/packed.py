"""Matrices in the order that kernels for this CPU read them in, from the start.

`linear` gets a matrix row by row and brings it into that order for each product, or reads it in one that is slow.
Packed, a matrix has as many bytes as before (rows are filled up to a block of at most 64), and stays `weight` of its
module: a tensor [out, in] of its dtype whose numbers only these products can read. The order is oneDNN's, or, of 16
bits that the CPU has no instructions for, one of ours.

Matrices that are multiplied by the same tensor one after the other are packed as one: each product costs some ten
microseconds besides its reading, and small ones leave threads waiting.

A GELU that takes a product unchanged is computed in it, while its numbers are in registers.

A tied embedding looks its rows up in the packed head. A block of `height` rows lies there column by column, `depth`
columns together: [out / height, in / depth, height, depth]; with AVX512 that has no bfloat16 all rows are one block of
these. oneDNN does not say so; it is tried, and compared number by number in parts of the matrix that lie apart, its end
among them, before the rows are thrown away.
"""

import ctypes
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import FastGELUActivation, GELUActivation, GELUTanh, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from handler.kernels.packed_linear import in_panels, widened_product, with_few_rows
from handler.weights.byte_linear import multiplies_bytes, pack_bytes, packed_byte_product
from handler.weights.call_order import activations, shared_inputs, watch
from handler.weights.cpu_linear import cpu_lacks, padded_rows, widens
from handler.weights.placement import align_hooks, replace_forward
from handler.weights.quantized import QuantizedConv1D, QuantizedEmbedding, QuantizedLinear, matrices, scaled

_Forward = Callable[[torch.Tensor], torch.Tensor]
_Function = tuple[str, list[float], str]  # of a product, in oneDNN's words: its name, its numbers, its algorithm

_ROWS = 256  # in a product, that the order is chosen for: also the fastest for one (python -m benchmarks.packed)
_LEAST_INT8 = 1 << 21  # bytes; in smaller matrices splitting the inputs costs more than the product
_HEIGHTS, _DEPTHS = (64, 48, 32, 24, 16, 8), (1, 2, 4)
_INT8_WIDTH = 64  # columns of int8 matrices come in so many
_COMPARED_ROWS, _COMPARED_PARTS = 1024, 16  # of a part, and at most
_NO_FUNCTION: _Function = ("none", [], "")
_GELU_BY_TANH = (NewGELUActivation, FastGELUActivation, GELUTanh)


@torch.no_grad()
def pack_weights(model: PreTrainedModel) -> int:
    """Pack the linear layers that are in this CPU's memory and compute there, one at a time; bytes of what is packed.

    Left as they are: what streams from disk or to a GPU, int4 and small int8 matrices, for which PyTorch's own kernels
    are better, dtypes that this CPU has neither instructions nor code of ours for, matrices that another module's code
    multiplies by itself, and a tied embedding whose packed rows are not found.
    """
    if not _packs(model):
        return 0
    modules = [model.get_submodule(name) for name in matrices(model, None)]
    modules += [m for m in model.modules() if isinstance(m, QuantizedLinear | QuantizedConv1D | QuantizedEmbedding)]
    users: dict[nn.Parameter, list[nn.Module]] = {}
    for module in modules:
        users.setdefault(cast(nn.Parameter, module.weight), []).append(module)
    alone = {
        modules[0]
        for weight, modules in users.items()
        if len(modules) == 1 and weight.dtype != torch.int8 and _can_pack(weight, modules[0])
    }
    packed, calls = 0, watch(model) if alone else []
    for names in shared_inputs(calls):
        group = [module for name in names if (module := model.get_submodule(name)) in alone]
        if len(group) > 1 and len({cast(nn.Parameter, module.weight).dtype for module in group}) == 1:
            for module in group:
                del users[cast(nn.Parameter, module.weight)]
            packed += _pack_joined(group)
    next_to = {model.get_submodule(one): model.get_submodule(other) for one, other in activations(calls).items()}
    while users:  # nothing holds on to what is packed: of another dtype than the file's, it is in memory
        weight, modules = users.popitem()
        packed += _pack(weight, modules, next_to.get(modules[0]) if modules[0] in alone else None)
    return packed


class PackedMatrix(nn.Parameter):
    """The weight of a module, [out, in], whose numbers only our product can read."""


def can_pack_all(model: PreTrainedModel) -> bool:
    """Whether all that is multiplied is in matrices that can be packed, where they are in memory: no experts in one
    tensor, for instance. The model may be on the meta device."""
    if not _packs(model):
        return False
    found = {model.get_submodule(name).weight for name in matrices(model, None)} | _embedded(model)
    return all(weight.dim() < 2 or weight in found for weight in model.parameters())


def _packs(model: PreTrainedModel) -> bool:
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return is_x86 and not getattr(model.config, "slow_but_exact", False)  # BLOOM's, whose code slices weights


def _embedded(model: nn.Module) -> set[torch.Tensor]:
    """What embeddings look up."""
    return {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}


def has_plain_matrices(model: nn.Module) -> bool:
    """Whether 16-bit matrices are multiplied that are not packed: what steps bring to the device that computes, and
    what is in memory, but for what embeddings look up."""
    embedded = _embedded(model)
    return any(hook.offload for module in model.modules() for hook in align_hooks(module)) or any(
        matrix.dim() > 1 and matrix.itemsize == 2 and matrix.device.type == "cpu" and not _is_packed(matrix)
        for name, matrix in model.named_parameters()
        if matrix not in embedded and not name.endswith("_scale")  # of integers
    )


def own_resident_weights(model: PreTrainedModel) -> None:
    """Copy what is on the CPU out of the mapped files, tensor by tensor: the kernel may throw pages of files out, and
    does where memory is short and others are read. What is packed is a copy already.

    Accelerate's hooks know tied weights by their addresses. These are free now, and what comes to lie there would be
    taken for a tied weight.
    """
    moved = [parameter for parameter in model.parameters() if parameter.device.type == "cpu"]
    for parameter in moved:
        if not _is_packed(parameter):
            parameter.data = parameter.data.clone()
    if moved:
        for hook in (hook for module in model.modules() for hook in align_hooks(module)):
            hook.tied_params_map, hook.tied_params_names = None, set()


def products_of(model: PreTrainedModel, main_device: str, packed: int) -> str:
    """What matrices are multiplied in, and how, in words. packed: bytes of weights that are."""
    dtype = str(model.dtype).removeprefix("torch.")
    if main_device != "cpu":
        return dtype
    if getattr(model, "is_quantized", False):
        return f"integers, for {dtype}"
    words = [dtype]
    if packed:
        words.append(f"{packed / 1e9:.2f} GB packed" + (" and multiplied in float32" if widens(model.dtype) else ""))
    if cpu_lacks(model.dtype) and has_plain_matrices(model):
        words.append(("the rest " if packed else "") + "of many rows in blocks of float32")
    return ", ".join(words)


def _pack(weight: nn.Parameter, users: list[nn.Module], activation: nn.Module | None = None) -> int:
    """Pack a matrix for all modules that use it, or none; its bytes, or 0.

    activation: what its only user's product goes to, and nothing else does."""
    linear = [module for module in users if not isinstance(module, nn.Embedding)]
    if not linear or not _can_pack(weight, linear[0]):
        return 0
    rows = _rows(linear[0])
    if rows.dtype == torch.int8:
        packed = pack_bytes(rows)
        sums = torch._int_mm(rows.new_ones(1, rows.shape[1]), rows.t())[0]
    else:
        packed = _packed(rows)
    blocks = None
    if len(linear) < len(users) and (blocks := _blocks(packed, rows)) is None:
        return 0
    parameter = nn.Parameter(packed, requires_grad=False)
    if packed.layout == torch.strided:
        parameter = PackedMatrix(packed.flatten()[: rows.numel()].view(rows.shape), requires_grad=False)
    for module in users:
        module.weight = parameter
        if blocks is not None and module not in linear:
            replace_forward(module, _lookup(packed, blocks, cast(nn.Embedding, module)))
        elif rows.dtype == torch.int8:
            replace_forward(module, _integer_product(packed, sums, cast(QuantizedLinear, module)))
        else:
            function = _function(activation)
            replace_forward(module, _product(packed, len(rows), cast(torch.Tensor | None, module.bias), function))
            if activation is not None and function is not _NO_FUNCTION:
                replace_forward(activation, lambda input: input)
    return _bytes(packed)


def _packed(rows: torch.Tensor) -> torch.Tensor:
    """A matrix [out, in] of floats in the order in which it is multiplied."""
    return in_panels(rows) if widens(rows.dtype) else torch.ops.mkldnn._reorder_linear_weight(rows.contiguous(), _ROWS)


def _is_packed(parameter: nn.Parameter) -> bool:
    return parameter.layout != torch.strided or isinstance(parameter, PackedMatrix)


def _bytes(packed: torch.Tensor) -> int:
    return packed.nbytes if packed.layout == torch.strided else torch.ops.mkldnn._nbytes(packed)


def _pack_joined(modules: list[nn.Module]) -> int:
    """Pack the matrices of modules that run one after the other on the same tensor as one; its bytes. What is `weight`
    of each has its shape and no memory."""
    rows = [_rows(module) for module in modules]
    packed = _packed(torch.cat(rows))
    biases = [cast(torch.Tensor | None, module.bias) for module in modules]
    bias = None
    if any(own is not None for own in biases):
        bias = torch.cat([r.new_zeros(len(r)) if own is None else own for own, r in zip(biases, rows, strict=True)])
    sizes = [len(r) for r in rows]
    product = _JointProduct(_product(packed, sum(sizes), bias), sizes)
    for index, module in enumerate(modules):
        module.weight = nn.Parameter(torch.empty_like(cast(nn.Parameter, module.weight), device="meta"), False)
        replace_forward(module, partial(product.part, index))
    return _bytes(packed)


class _JointProduct:
    """A product that the first of several modules makes, and of which the others take their part if they get the very
    same tensor after it. Whoever gets another makes the product for itself."""

    def __init__(self, product: _Forward, sizes: list[int]):
        self._product, self._sizes = product, sizes
        self._input: torch.Tensor | None = None
        self._parts: dict[int, torch.Tensor] = {}  # that are not taken yet

    def part(self, index: int, input: torch.Tensor) -> torch.Tensor:
        """Columns of the index-th module, [..., size]."""
        if index and input is self._input and index in self._parts:
            part = self._parts.pop(index)
            if not self._parts:
                self._input = None
            return part
        parts = self._product(input).split(self._sizes, dim=-1)
        if index == 0:
            self._input, self._parts = input, dict(enumerate(parts[1:], start=1))
        return parts[index]


def _can_pack(weight: nn.Parameter, module: nn.Module) -> bool:
    if weight.device.type != "cpu":
        return False
    if weight.dtype == torch.int8:
        scale = cast(torch.Tensor, module.weight_scale)
        return scale.dtype == torch.bfloat16 and weight.numel() >= _LEAST_INT8 and multiplies_bytes()
    return widens(weight.dtype) or (weight.dtype in (torch.float32, torch.bfloat16) and not cpu_lacks(weight.dtype))


def _rows(module: nn.Module) -> torch.Tensor:
    """Its matrix, [out, in]."""
    weight = cast(nn.Parameter, module.weight)
    return weight.t() if isinstance(module, Conv1D) and not isinstance(module, QuantizedConv1D) else weight


def _integer_product(packed: torch.Tensor, sums: torch.Tensor, module: QuantizedLinear) -> _Forward:
    multiply, bias = packed_byte_product(packed, module.weight_scale, sums), module.bias

    def forward(input: torch.Tensor) -> torch.Tensor:
        output = multiply(input.reshape(-1, input.shape[-1]))
        if bias is not None:
            output += bias
        return output.view(*input.shape[:-1], output.shape[-1])

    return forward


def _function(module: nn.Module | None) -> _Function:
    """What the module does to each number, if oneDNN can do the same."""
    kind = type(module)  # a subclass may do something else
    if isinstance(module, nn.GELU) and kind is nn.GELU:
        return "gelu", [], module.approximate
    if kind is GELUActivation:
        return "gelu", [], "none"
    return ("gelu", [], "tanh") if kind in _GELU_BY_TANH else _NO_FUNCTION


def _product(packed: torch.Tensor, out: int, bias: torch.Tensor | None, function: _Function = _NO_FUNCTION) -> _Forward:
    gelu = None if function is _NO_FUNCTION else function[-1]
    if widens(packed.dtype):
        return widened_product(packed, out, bias, gelu)
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def forward(input: torch.Tensor) -> torch.Tensor:
        rows = input.numel() // input.shape[-1]
        if (padded := padded_rows(rows)) == rows:
            return multiply(input, packed, bias, *function)
        inputs = input.new_empty(padded, input.shape[-1])  # what is in the rows beyond is in nobody's product
        inputs[:rows] = input.reshape(rows, -1)
        output = multiply(inputs, packed, bias, *function)[:rows]
        return output.view(*input.shape[:-1], output.shape[-1])

    return with_few_rows(forward, packed, bias, gelu)


def _lookup(packed: torch.Tensor, blocks: torch.Tensor, module: nn.Embedding) -> _Forward:
    height = blocks.shape[2]

    def forward(input: torch.Tensor, keep: torch.Tensor = packed) -> torch.Tensor:  # `blocks` is its memory
        rows = blocks[input // height, :, input % height].flatten(-2)[..., : module.embedding_dim]
        if isinstance(module, QuantizedEmbedding):
            rows = rows * module.weight_scale[input].unsqueeze(-1)
        return scaled(module, rows)

    return forward


def _blocks(packed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
    """The packed matrix's memory as [out / height, in / depth, height, depth], or None if it is not in such an order.

    rows: [out, in], the matrix. Of int8, rows are filled up with zeros too, and what oneDNN has summed up lies behind.
    """
    if packed.layout == torch.strided:
        return packed.unsqueeze(-1)
    size = torch.ops.mkldnn._nbytes(packed)
    memory = (ctypes.c_char * size).from_address(torch.ops.mkldnn.data_ptr(packed))
    numbers = torch.frombuffer(memory, dtype=packed.dtype)
    for height, depth in itertools.product((*_HEIGHTS, len(rows)), _DEPTHS):
        count = -(-len(rows) // height)
        width = rows.shape[1] if rows.dtype != torch.int8 else -(-rows.shape[1] // _INT8_WIDTH) * _INT8_WIDTH
        filled = count * height * width
        if width % depth == 0 and filled <= len(numbers):
            blocks = numbers[:filled].view(count, width // depth, height, depth)
            if all(torch.equal(ours, theirs) for ours, theirs in _compared(blocks, rows)):
                return blocks
    return None


def _compared(blocks: torch.Tensor, rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Some parts of the rows, the first and the last among them, out of the blocks and as they are."""
    count = max(1, _COMPARED_ROWS // blocks.shape[2])
    last = max(0, len(blocks) - count)
    for start in sorted({last * part // (_COMPARED_PARTS - 1) for part in range(_COMPARED_PARTS)}):
        part = blocks[start : start + count].transpose(1, 2).flatten(0, 1).flatten(1)[:, : rows.shape[1]]
        theirs = rows[start * blocks.shape[2] :][: len(part)]
        yield part[: len(theirs)], theirs
