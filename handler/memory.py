"""Who gets how much of the memory that is free on the GPUs, and in the control group: weights, keys and values."""

import logging
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from handler.engine import Engine
from handler.engine.architecture import Architecture
from handler.engine.capacity import Capacity
from handler.engine.draft_model import DraftModel
from handler.errors import LoadError
from handler.settings import Settings
from handler.weights.placement import Placement, max_memory, settled_map, spread_map, weight_bytes

logger = logging.getLogger(__name__)

JAVA_BYTES = 1_270_000_000  # of TorchServe's, measured with a full heap of 1 GiB; 0.2 GB when the worker is READY
RESERVE = 0.1  # of what is left, for fragmentation and what nobody foresees
_PAGE_CACHE_RESERVE = 0.03  # of what the page cache could hold: what does not fit there pushes out what does
_KV_CACHE_SHARE = 0.2  # of what is usable, at most, that the weights leave to keys and values when nobody set them
_LEAST_TOKENS = 128  # of keys and values, for a model that is worth serving


def free_memory(gpus: int) -> dict[int | str, int]:
    """Bytes that weights can take for good on each of the first GPUs, and on the CPU."""
    free: dict[int | str, int] = {index: torch.cuda.mem_get_info(index)[0] for index in range(gpus)}
    return free | {"cpu": max(0, free_host_memory() - _java_growth())}


def device_limits(model: PreTrainedModel, settings: Settings, free: Mapping[int | str, int]) -> dict[int | str, int]:
    """`max_memory` for settings that name none: the weights that each device may hold, in bytes.

    free: bytes on each device; less keys and values, activations, and what is read ahead when not all fits.
    model: on the meta device, or loaded.
    """
    capacity = Capacity.of(Architecture.of(model), settings)
    computing = [device for device in free if device != "cpu"] or ["cpu"]
    share = 1.0 if settings.kv_cache_memory is not None else _KV_CACHE_SHARE
    limits = {}
    for device, size in free.items():
        if device in computing:
            usable = max(0, size - capacity.activation_bytes_on(device)) * (1 - RESERVE)
            held = capacity.kv_cache_bytes / len(computing) + capacity.kv_copy_bytes
            limits[device] = max(0, int(usable - min(held, usable * share)))
        else:  # the host of a GPU, for which it is pinned: nothing can be taken back
            limits[device] = int(size * (1 - RESERVE))
    on_cpu = computing == ["cpu"]
    if on_cpu or isinstance(settings.device_map, str):
        # The less memory there is for weights, the larger may be what is read ahead: once more with what is left.
        usable = limits["cpu"]
        for _ in range(2):
            placed = (
                spread_map(model, limits["cpu"]) if on_cpu else settled_map(settings, len(computing), model, limits)
            )
            limits["cpu"] = max(0, usable - Placement.of(model, placed).read_ahead_bytes)
    return limits


def limits_beside_draft(
    model: PreTrainedModel, settings: Settings, free: Mapping[int | str, int], draft: PreTrainedModel
) -> dict[int | str, int] | None:
    """The weights that each device may hold, in bytes, beside those of a draft model, its keys and its values. None
    where no step brings weights: then it is of no use. Both models may be on the meta device."""
    gpus = len(free) - 1
    named = max_memory(settings, gpus)
    limits = named or device_limits(model, settings, free)
    placement = Placement.of(model, settled_map(settings, gpus, model, limits))
    if not placement.is_streaming:
        return None
    main = next(device for device in free if placement.main_device in (device, f"gpu {device}"))
    size = weight_bytes(draft)
    if named:
        return named | {main: max(0, named.get(main, 0) - size)}
    left = max(0, free[main] - size - DraftModel.cache_bytes(draft))
    return device_limits(model, settings, {**free, main: left})


def with_kv_cache_limit(settings: Settings, model: PreTrainedModel, placement: Placement) -> Settings:
    """The settings with a limit on keys and values, where they name none and memory is too small for the default.

    Raises LoadError when there is no room for keys and values beside the weights.
    """
    if settings.kv_cache_memory is not None:
        return settings
    architecture = Architecture.of(model)
    capacity = Capacity.of(architecture, settings)
    budget = kv_cache_budget(placement, capacity)
    if capacity.kv_cache_bytes <= budget:
        return settings
    tokens = budget // architecture.kv_bytes_per_token
    if tokens < min(_LEAST_TOKENS, capacity.max_sequence_length):
        raise LoadError(
            f"beside the weights there is memory for {tokens} tokens of keys and values: give the worker more memory, "
            "or lower max_sequence_length, max_memory, prefill_chunk or max_batch_size in setup_config.json"
        )
    logger.warning("memory is left for %d tokens of keys and values instead of %d", tokens, capacity.kv_cache_tokens)
    return settings.model_copy(update={"kv_cache_memory": budget})


def kv_cache_budget(placement: Placement, capacity: Capacity) -> int:
    """Bytes that the keys and values of all layers together may take, or 0.

    Beside them a forward needs activations and copies of keys and values on each device that computes. The main one
    also needs room for what is streamed through it.
    """
    layers = placement.computed_layers
    shares = []
    for device, count in layers.items():
        taken = capacity.activation_bytes_on(device)
        taken += placement.main_device_bytes if device == placement.main_device else 0
        free = free_host_memory() if device == "cpu" else torch.cuda.mem_get_info(int(device.split()[1]))[0]
        if count:
            usable = max(0, int((free - taken) * (1 - RESERVE)))
            shares.append(usable * sum(layers.values()) // (count + capacity.copied_layers))
    return min(shares, default=0)


def page_cache_room(engine: Engine) -> int:
    """Bytes of the disk tier that the host's page cache can hold beside the forward that begins now. What keys and
    values may come to need does not count before they do: the kernel takes pages of files back when memory is short."""
    return int(max(0, free_host_memory() - engine.bytes_to_come) * (1 - _PAGE_CACHE_RESERVE))


def free_host_memory() -> int:
    """Bytes that this process can take now; pages of files count as free, but for those that it has mapped, such as
    its libraries.

    Those of the machine, or of a control group that it is in, version 1 or 2, whichever has less.
    """
    free = min([psutil.virtual_memory().available, *_free_in_control_groups()])
    return max(0, free - getattr(psutil.Process().memory_info(), "shared", 0))  # only Linux tells


def _java_growth() -> int:
    """Bytes that TorchServe's Java, which has started this worker, may take besides: bodies of requests lie there."""
    try:
        parent = psutil.Process().parent()
        return max(0, JAVA_BYTES - parent.memory_info().rss) if parent and parent.name() == "java" else 0
    except psutil.NoSuchProcess:
        return 0


def _free_in_control_groups(root: Path = Path("/sys/fs/cgroup"), of: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What each group with a limit has left; its page cache counts as free, but not what lies in tmpfs."""
    free = []
    for line in of.read_text().splitlines() if of.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version_2 = not controllers
        limit_name = "memory.max" if version_2 else "memory.limit_in_bytes"
        kinds = ("anon", "shmem", "slab_unreclaimable") if version_2 else ("total_rss", "total_shmem")
        folder, group = root if version_2 else root / "memory", Path(path.strip("/"))
        # The groups above count too. A container may see its own as the root, under the path that it has outside.
        for parent in (group, *group.parents):
            limit, statistics = folder / parent / limit_name, folder / parent / "memory.stat"
            if limit.is_file() and statistics.is_file() and limit.read_text().strip().isdecimal():
                used = dict(line.split() for line in statistics.read_text().splitlines())
                free.append(int(limit.read_text()) - sum(int(used.get(kind, 0)) for kind in kinds))
    return free
