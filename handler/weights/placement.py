"""Which weight is on which device: what is asked of Accelerate, and what it settled on."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedModel

from handler.settings import Settings

logger = logging.getLogger(__name__)


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


def device_map(settings: Settings, gpus: int) -> str | dict[str, int | str]:
    """`device_map` with "cpu" in place of the GPUs from number `gpus` on, which the machine lacks."""
    if isinstance(settings.device_map, str):
        return settings.device_map
    placed = dict(settings.device_map)
    for module, device in placed.items():
        if isinstance(device, int) and device >= gpus:
            logger.warning("device_map puts %r on GPU %d and the machine has %d: on the CPU", module, device, gpus)
            placed[module] = "cpu"
    return placed


def placement(model: PreTrainedModel, placed: dict[str, int | str]) -> Iterator[tuple[str, str, int]]:
    """(name, "gpu 0", "cpu" or "disk", bytes) of every parameter, from the device map that Accelerate settled on."""
    for name, parameter in model.named_parameters():
        module = max((key for key in placed if f"{name}.".startswith(f"{key}." if key else "")), key=len)
        device = placed[module]
        device = f"gpu {device}" if isinstance(device, int) else str(device)
        yield name, device, parameter.numel() * parameter.element_size()


def decoder_layer(name: str) -> str | None:
    """The decoder layer that a parameter belongs to, such as `transformer.h.3`; None outside of them."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else None


def tiers_of(model: PreTrainedModel, placed: dict[str, int | str]) -> dict[str, Tier]:
    """What each device holds, by the names that `placement` gives them."""
    size: dict[str, int] = defaultdict(int)
    layers: dict[str, set[str]] = defaultdict(set)
    for name, device, count in placement(model, placed):
        size[device] += count
        if layer := decoder_layer(name):
            layers[device].add(layer)
    return {device: Tier(len(layers[device]), size[device]) for device in size}
