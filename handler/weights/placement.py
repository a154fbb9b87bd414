"""Which weight is on which device: what is asked of Accelerate, and what it settled on."""

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations.accelerate import _get_device_map

from handler.settings import Settings

logger = logging.getLogger(__name__)

_READ_AHEAD = 64 << 20  # bytes of weights that are read ahead, at least
GPU_ALIGNMENT = 512  # bytes; of tensors on a GPU
SMALL_BYTES = 256 << 10  # smaller tensors, such as norms and biases, are brought to where they are used once, and stay


@dataclass(frozen=True)
class Tier:
    """What one device holds: the number of decoder layers wholly or partly there, and the bytes of weights."""

    layers: int
    bytes: int


def max_memory(settings: Settings, gpus: int) -> dict[int | str, int] | None:
    """`max_memory` without the GPUs from number `gpus` on, so that the sample's own file works on a laptop."""
    limits = dict(settings.max_memory or {})
    for device in [device for device in limits if isinstance(device, int) and device >= gpus]:
        logger.warning("max_memory names GPU %d and the machine has %d: dropped", device, gpus)
        del limits[device]
    return limits or None


def device_map(
    settings: Settings, gpus: int, model: PreTrainedModel, limits: Mapping[int | str, int]
) -> str | dict[str, int | str]:
    """What Accelerate is to place `model` by, which may be on the meta device, within `limits`.

    A map of modules has "cpu" in place of the GPUs from number `gpus` on, which the machine lacks. "auto" is our own
    map where there are no GPUs.
    """
    if settings.device_map == "auto" and not gpus:
        return spread_map(model, limits.get("cpu", 0))
    if isinstance(settings.device_map, str):
        return settings.device_map
    placed = dict(settings.device_map)
    for module, device in placed.items():
        if isinstance(device, int) and device >= gpus:
            logger.warning("device_map puts %r on GPU %d and the machine has %d: on the CPU", module, device, gpus)
            placed[module] = "cpu"
    return placed


def settled_map(
    settings: Settings, gpus: int, model: PreTrainedModel, limits: Mapping[int | str, int]
) -> dict[str, int | str]:
    """The device map that Accelerate will settle on."""
    return _get_device_map(model, device_map(settings, gpus, model, limits), dict(limits), None)


@dataclass(frozen=True)
class Part:
    """A decoder layer, or a module outside of them: name, device ("gpu 0", "cpu" or "disk"), bytes of its weights.

    looked_up: whether a step reads a few rows of it only, as of an input embedding that is not tied to the output.
    """

    name: str
    device: str
    bytes: int
    looked_up: bool = False

    @property
    def is_layer(self) -> bool:
        return _decoder_layer(f"{self.name}.") is not None


@dataclass(frozen=True)
class Placement:
    """Where all weights are, and with them what is computed where. The parts are in the model's order.

    main_device: where Accelerate computes what lies on "cpu" or "disk": the first GPU of its map, or the CPU.
    read_ahead_bytes: memory of the host for weights of the disk tier, in use and read ahead: the largest tensor, and
        beside it the largest of a layer or many small ones, so that reading goes on while one computes.
    ring_bytes: memory of a GPU for weights that are brought to it, in use and copied ahead: the largest tensor, and
        beside it the largest layer or many small tensors.
    small_bytes: of what is brought to a GPU once, when it is loaded, and stays.
    draft_cache_bytes: keys and values of a draft model, on the main device, where its weights are a part too.
    """

    parts: list[Part]
    main_device: str
    read_ahead_bytes: int = 0
    ring_bytes: int = 0
    small_bytes: int = 0
    draft_cache_bytes: int = 0

    @classmethod
    def of(cls, model: PreTrainedModel, device_map: dict[str, int | str]) -> "Placement":
        """By the device map that Accelerate settled on. The model may be on the meta device."""
        sizes: dict[tuple[str, str], int] = defaultdict(int)
        gpus = [_device_name(device) for device in device_map.values() if isinstance(device, int)]
        main_device = next(iter(gpus), "cpu")
        table = _lookup_table(model) if main_device == "cpu" else None  # Accelerate brings a whole one to a GPU
        streamed: dict[str, int] = {}
        brought: dict[str, int] = {}
        for name, parameter in model.named_parameters():
            module = max((key for key in device_map if f"{name}.".startswith(f"{key}." if key else "")), key=len)
            part, device = _decoder_layer(name) or name.rpartition(".")[0], _device_name(device_map[module])
            sizes[part, device] += parameter.nbytes
            if device == "disk" and part != table:
                streamed[name] = parameter.nbytes
            if main_device != "cpu" and device in ("cpu", "disk"):
                brought[name] = parameter.nbytes
        parts = [Part(name, device, size, name == table) for (name, device), size in sizes.items()]
        of_layers = max((size for name, size in streamed.items() if _decoder_layer(name)), default=0)
        read_ahead = max(streamed.values(), default=0) + max(of_layers, _READ_AHEAD)
        large = {name: size for name, size in brought.items() if size > SMALL_BYTES}
        layers: dict[str, int] = defaultdict(int)
        for name, size in large.items():
            if layer := _decoder_layer(name):
                layers[layer] += size
        ring = max(large.values(), default=0) + max([_READ_AHEAD, *layers.values()])
        return cls(
            parts,
            main_device,
            read_ahead_bytes=min(read_ahead, sum(streamed.values())),
            ring_bytes=min(ring, sum(large.values()) + len(large) * GPU_ALIGNMENT),
            small_bytes=sum(brought.values()) - sum(large.values()),
        )

    def with_draft(self, draft: PreTrainedModel, cache_bytes: int) -> "Placement":
        """With a draft model on the main device, which may be on the meta device yet."""
        part = Part("draft_model", self.main_device, weight_bytes(draft))
        return replace(self, parts=[*self.parts, part], draft_cache_bytes=cache_bytes)

    @property
    def is_streaming(self) -> bool:
        """Whether a step brings weights to the device that computes."""
        return any(self.is_streamed(part) for part in self.parts)

    @property
    def tiers(self) -> dict[str, Tier]:
        """What each device holds."""
        devices = dict.fromkeys(part.device for part in self.parts)
        held = {device: [part for part in self.parts if part.device == device] for device in devices}
        return {
            device: Tier(sum(part.is_layer for part in parts), sum(part.bytes for part in parts))
            for device, parts in held.items()
        }

    @property
    def computed_layers(self) -> dict[str, int]:
        """How many decoder layers each device computes, and so holds the keys and values of."""
        layers = {part.name: part.device for part in self.parts if part.is_layer}
        devices = [device if device.startswith("gpu") else self.main_device for device in layers.values()]
        return {device: devices.count(device) for device in dict.fromkeys([self.main_device, *devices])}

    @property
    def main_device_bytes(self) -> int:
        """Room that the main device needs, once all is loaded: for a draft model's keys and values, and for weights
        that are brought there."""
        return self.draft_cache_bytes + (self.read_ahead_bytes if self.main_device == "cpu" else self.ring_bytes)

    def is_streamed(self, part: Part) -> bool:
        return part.device == "disk" or (part.device == "cpu" and self.main_device != "cpu")


def weight_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def spread_map(model: PreTrainedModel, limit: int) -> dict[str, int | str]:
    """A device map for a CPU that computes and holds up to `limit` bytes of weights; the others are on disk.

    What is outside the decoder layers comes first, as it is large and used in each step; a table of which a step looks
    up a few rows comes last. Layers on disk lie between others, and are read while those compute. Unlike Accelerate's
    own, the map does not end at the first thing that is too large. The model may be on the meta device.
    """
    blocks = dict(_blocks(model))
    owners: dict[torch.nn.Parameter, str] = {}
    for name, block in blocks.items():
        for parameter in block.parameters():
            owners.setdefault(parameter, name)
    sizes = {name: sum(p.nbytes for p, owner in owners.items() if owner == name) for name in blocks}
    if sum(sizes.values()) <= limit:
        return {"": "cpu"}
    layers = {name: size for name, size in sizes.items() if _decoder_layer(f"{name}.")}
    lookup = _lookup_table(model)
    table = next((name for name in blocks if lookup and f"{lookup}.".startswith(f"{name}.")), None)
    on_cpu, left = set[str](), limit
    for name in blocks:
        if name not in layers and name != table and sizes[name] <= left:
            on_cpu.add(name)
            left -= sizes[name]
    on_cpu |= spread(layers, left)
    left -= sum(layers[name] for name in on_cpu & layers.keys())
    if table and sizes[table] <= left:
        on_cpu.add(table)
    # Tied weights stay together: a block that owns none of its own goes where their owner is.
    homes = {name: next((owners[p] for p in block.parameters()), name) for name, block in blocks.items()}
    return {name: "cpu" if homes[name] in on_cpu else "disk" for name in blocks}


def _blocks(module: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    """The decoder layers, and the modules outside of them, in the model's order."""
    for name, child in module.named_children():
        if name.isdecimal() or not any(isinstance(inner, torch.nn.ModuleList) for inner in child.modules()):
            yield f"{prefix}{name}", child
        else:
            yield from _blocks(child, f"{prefix}{name}.")


def spread(sizes: Mapping[str, int], room: int) -> set[str]:
    """Of things with these sizes, as many as `room` holds, spread evenly over their order."""
    total, passed, chosen, filled = sum(sizes.values()), 0, set(), 0
    for name, size in sizes.items():
        passed += size
        if filled + size <= room * passed / total:
            chosen.add(name)
            filled += size
    return chosen


def _lookup_table(model: PreTrainedModel) -> str | None:
    """The name of the input embedding, unless the output is computed with it too."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if outputs is not None and outputs.weight is inputs.weight:
        return None
    return next(name for name, module in model.named_modules() if module is inputs)


def _device_name(device: int | str) -> str:
    return f"gpu {device}" if isinstance(device, int) else str(device)


def _decoder_layer(name: str) -> str | None:
    """The decoder layer that a parameter belongs to, such as `transformer.h.3`; None outside of them."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else None


def align_hooks(module: torch.nn.Module) -> Iterator:
    """Accelerate's hooks on a module that move or load tensors."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        if hasattr(one, "offload") and hasattr(one, "execution_device"):
            yield one


def replace_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> None:
    """Below Accelerate's hook, where there is one."""
    setattr(module, "_old_forward" if hasattr(module, "_hf_hook") else "forward", forward)
