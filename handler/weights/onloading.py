"""Weights that a GPU computes with and does not hold, copied there while it computes with those before them.

Left to themselves, Accelerate's hooks copy a tensor when its module's forward begins, out of memory that the GPU cannot
read by itself (8 GB/s instead of 55 on an H100's bus), wait for it, and give what the GPU has free back to the driver,
for each tensor anew. Here the host's tensors lie in memory that the driver knows ("pinned"), and go on a stream of
their own into a ring of the GPU's memory, in the order in which modules ask for them.
"""

import contextlib
import copy
import logging
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.hooks import AlignDevicesHook
from torch import nn

from .foresight import Foresight
from .placement import GPU_ALIGNMENT, SMALL_BYTES, align_hooks
from .streaming import StreamedWeights, aligned_memory

logger = logging.getLogger(__name__)

_PORTABLE = 1  # cudaHostRegisterPortable: for all GPUs


def onload_weights(model: nn.Module, room: int) -> "OnloadedWeights | None":
    """Let the hooks of a model that was dispatched to a GPU bring weights there ahead of their use; None where none has
    to.

    Small tensors stay there from now on. room: bytes of the ring, taken when the first forward begins.
    """
    hooked = [(module, hook) for module in model.modules() for hook in align_hooks(module) if hook.offload]
    if not hooked:
        return None
    all_tiers, device = hooked[0][1].weights_map.dataset, hooked[0][1].execution_device
    source = all_tiers
    if isinstance(all_tiers, StreamedWeights):
        register(all_tiers.memory)
        source = all_tiers.source
    source.state_dict = pinned(source.state_dict)
    weights = OnloadedWeights(all_tiers, source.state_dict, device, room)
    for module, hook in hooked:
        _bring_for(module, hook, weights)
    model.register_forward_pre_hook(lambda *_: weights.begin_pass())
    return weights


class OnloadedWeights:
    """What a model's hooks get tensors on the GPU from, by name. For the thread that runs the model.

    source: the tensors on the host; asked for one that is not in `host`, it reads it from disk, ahead by itself.
    host: those of the host's memory, which can be copied ahead.
    device: where the tensors go.
    """

    def __init__(self, source: Mapping[str, torch.Tensor], host: Mapping[str, torch.Tensor], device, room: int):
        self._source, self._host, self.device, self._room = source, host, torch.device(device), room
        self._copying = torch.cuda.Stream(self.device)
        self._ring: Ring | None = None
        self._memory = torch.empty(0)
        self._foresight = Foresight(self._copy_ahead, self._forget)
        self._in_use: dict[str, _Copy] = {}

    def bring(self, name: str) -> torch.Tensor:
        """The tensor, on the GPU, for what is launched on the current stream from now on, until `let_go`."""
        found = self._foresight.take(name) or self._copy(name, self._source[name])
        self._in_use[name] = found
        self._foresight.go_on()
        torch.cuda.current_stream(self.device).wait_event(found.ready)
        return found.tensor

    def let_go(self, name: str) -> None:
        """What was launched on the current stream is the last that needs the tensor."""
        if (used := self._in_use.pop(name, None)) is not None:
            self._release(used, torch.cuda.current_stream(self.device).record_event())
        self._foresight.go_on()

    def begin_pass(self) -> None:
        """Let go of what a forward that failed has left."""
        for name in list(self._in_use):
            self.let_go(name)

    def _copy_ahead(self, name: str) -> "_Copy | None":
        if name not in self._host:  # it is read from disk, which takes much longer than to copy it
            return None
        tensor = self._host[name]
        place = self._place(tensor.nbytes)
        return None if place is None else self._copy_to(place, tensor)

    def _copy(self, name: str, tensor: torch.Tensor) -> "_Copy":
        if (place := self._place(tensor.nbytes)) is not None:
            copied = self._copy_to(place, tensor)
        else:  # modules within modules may hold more at once than the ring has room for
            with torch.cuda.stream(self._copying):
                target = torch.empty_like(tensor, device=self.device)
                _launch_copy(target, tensor)
            target.record_stream(torch.cuda.current_stream(self.device))
            copied = _Copy(target, self._copying.record_event(), None)
        if name not in self._host:
            copied.ready.synchronize()  # its memory is read into again
        return copied

    def _copy_to(self, place: "Place", tensor: torch.Tensor) -> "_Copy":
        target = self._memory[place.start : place.start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        with torch.cuda.stream(self._copying):
            for event in place.free_after:
                self._copying.wait_event(event)
            _launch_copy(target, tensor)
        return _Copy(target, self._copying.record_event(), place)

    def _place(self, size: int) -> "Place | None":
        if self._ring is None:
            with torch.inference_mode(False):
                self._memory = torch.empty(self._room, dtype=torch.uint8, device=self.device)
            self._ring = Ring(self._room)
            self._copying.wait_stream(torch.cuda.current_stream(self.device))  # for whose tensors it was before
        return self._ring.take(size)

    def _forget(self, copied: "_Copy") -> None:
        self._release(copied, copied.ready)

    def _release(self, copied: "_Copy", event: torch.cuda.Event) -> None:
        if copied.place is not None:
            copied.place.released = event


def _launch_copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)


@dataclass(eq=False)
class Place:
    """Bytes start..end of a ring. free_after: what must have happened before they are written. released: what will have
    happened once they are free again; None while somebody has them."""

    start: int
    end: int
    free_after: list[torch.cuda.Event]
    released: torch.cuda.Event | None = None


@dataclass(eq=False)
class _Copy:
    """A tensor on the GPU once `ready` has happened; in a place of the ring, or in memory of its own."""

    tensor: torch.Tensor
    ready: torch.cuda.Event
    place: Place | None


class Ring:
    """Memory for what comes and goes in about the same order: places one behind the other. One stream writes them:
    what it has waited for once, it need not wait for again."""

    def __init__(self, size: int):
        self._size = size
        self._places: deque[Place] = deque()  # the oldest first

    def take(self, size: int) -> Place | None:
        """None where there is no room, or somebody still has what is there."""
        start = self._places[-1].end if self._places else 0
        if start + size > self._size:
            start = 0
        end = -(-(start + size) // GPU_ALIGNMENT) * GPU_ALIGNMENT
        if start + size > self._size:
            return None
        overlapping = [i for i, place in enumerate(self._places) if place.start < end and start < place.end]
        going = [self._places[i] for i in range(overlapping[-1] + 1 if overlapping else 0)]
        free_after = [place.released for place in going if place.released is not None]
        if len(free_after) < len(going):
            return None
        for _ in going:
            self._places.popleft()
        place = Place(start, end, free_after)
        self._places.append(place)
        return place


def pinned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors in memory that a GPU can read by itself, where the driver allows. Tied ones stay so. The dict
    given is empty afterwards: each tensor's own memory is free before the next needs more."""
    starts: dict[tuple[int, int], int] = {}
    size = 0
    for tensor in tensors.values():
        if (tensor.data_ptr(), tensor.nbytes) not in starts:
            starts[tensor.data_ptr(), tensor.nbytes] = size
            size += -(-tensor.nbytes // GPU_ALIGNMENT) * GPU_ALIGNMENT
    memory = aligned_memory(max(1, size))
    whole, moved = torch.from_numpy(memory), {}
    for name in list(tensors):
        tensor = tensors.pop(name)
        start = starts[tensor.data_ptr(), tensor.nbytes]
        moved[name] = whole[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    register(memory)
    return moved


def register(memory: np.ndarray) -> None:
    """Tell the driver of memory that copies are made from: the GPU then reads it by itself. Until it is freed."""
    address = torch.from_numpy(memory).data_ptr()
    try:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, memory.nbytes, _PORTABLE))
    except RuntimeError as error:
        logger.warning("%.2f GB of weights cannot be pinned, and are copied slowly: %s", memory.nbytes / 1e9, error)
        with contextlib.suppress(RuntimeError):  # or the next kernel would be blamed for it
            torch.zeros(1, device="cuda")
        return
    # Or what is mapped there next would be taken for the same memory.
    weakref.finalize(memory, torch.cuda.cudart().cudaHostUnregister, address).atexit = False


def _bring_for(module: nn.Module, hook: AlignDevicesHook, weights: OnloadedWeights) -> None:
    """Let a hook's module have its tensors through `weights`; what else the hook does, it does as before."""
    owned: list[tuple[nn.Module, str, nn.Parameter, str]] = []
    stored, device = hook.weights_map, hook.execution_device
    for prefix, owner in module.named_modules() if hook.place_submodules else [("", module)]:
        prefix += "." if prefix else ""
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.device == weights.device:  # tied to one that is there
                continue
            if parameter.nbytes > SMALL_BYTES:
                owned.append((owner, name, parameter, f"{stored.prefix}{prefix}{name}"))
            else:
                setattr(owner, name, nn.Parameter(stored[prefix + name].to(device), requires_grad=False))
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.device.type == "meta":  # offload_buffers
                owner._buffers[name] = stored[prefix + name].to(device)
    aligning = copy.copy(hook)
    aligning.offload = False

    def pre_forward(module, *args, **kwargs):
        for owner, name, _, full in owned:
            owner._parameters[name] = nn.Parameter(weights.bring(full), requires_grad=False)
        return aligning.pre_forward(module, *args, **kwargs)

    def post_forward(module, output):
        for owner, name, absent, full in owned:
            owner._parameters[name] = absent
            weights.let_go(full)
        return aligning.post_forward(module, output)

    hook.pre_forward, hook.post_forward = pre_forward, post_forward
