"""Memory of tensors that a recorded forward writes anew each time it runs."""

import weakref

import numpy as np
import torch


class Rooms:
    """One tensor's memory is another's once nothing sees the first: what runs once more runs in the same order."""

    def __init__(self) -> None:
        self._blocks: dict[int, np.ndarray] = {}  # by their addresses
        self._free: list[np.ndarray] = []
        self._used: dict[int, int] = {}  # bytes of blocks, from their beginning: a tenant has not all that is there

    def tensor(self, like: torch.Tensor) -> torch.Tensor:
        """One of the same shape, strides and dtype, whose numbers are whatever lies there."""
        size = like.untyped_storage().nbytes()
        seen = self._block(size)[:]  # gone with the last tensor that sees it
        address = seen.ctypes.data
        self._used[address] = max(size, self._used.get(address, 0))
        weakref.finalize(seen, self._free.append, self._blocks[address]).atexit = False
        return _as(torch.from_numpy(seen), like)

    def __contains__(self, address: int | None) -> bool:
        """Whether memory that begins there is one of these."""
        return address in self._blocks

    def kept(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same, which does not keep the memory from others."""
        return _as(torch.from_numpy(self._blocks[tensor.untyped_storage().data_ptr()]), tensor)

    def spoil(self) -> None:
        """Make all floats NaN."""
        for address, used in self._used.items():
            self._blocks[address][:used] = 0xFF

    def _block(self, size: int) -> np.ndarray:
        fitting = [index for index, block in enumerate(self._free) if len(block) >= size]
        if fitting:
            return self._free.pop(min(fitting, key=lambda index: len(self._free[index])))
        # Powers of two: those of rows that become more come to no more than twice the last one's.
        block = torch.empty(1 << max(0, size - 1).bit_length(), dtype=torch.uint8).numpy()
        self._blocks[block.ctypes.data] = block
        return block


def _as(memory: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    numbers = memory[: len(memory) // like.itemsize * like.itemsize].view(like.dtype)
    return numbers.as_strided(like.shape, like.stride(), like.storage_offset())
