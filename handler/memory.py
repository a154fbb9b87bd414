"""How many bytes are left for keys and values once the weights are placed: on GPUs, or in the control group."""

import logging
from pathlib import Path

import psutil
import torch

from handler.engine.architecture import Architecture
from handler.engine.capacity import Capacity
from handler.errors import LoadError
from handler.loading import LoadedModel
from handler.settings import Settings
from handler.weights.placement import Placement

logger = logging.getLogger(__name__)

RESERVE = 0.1  # of what is left, for fragmentation and what nobody foresees
_LEAST_TOKENS = 128  # of keys and values, for a model that is worth serving


def with_kv_cache_limit(settings: Settings, loaded: LoadedModel, copied: int) -> Settings:
    """The settings with a limit on keys and values, where they name none and memory is too small for the default.

    copied: bytes of weights on the CPU that were copied while loading; the others are mapped.
    Raises LoadError when there is no room for keys and values beside the weights.
    """
    if settings.kv_cache_memory is not None:
        return settings
    architecture = Architecture.of(loaded.model)
    capacity = Capacity.of(architecture, settings)
    budget = kv_cache_budget(loaded.placement, capacity.workspace_bytes, copied)
    if capacity.kv_cache_bytes <= budget:
        return settings
    tokens = budget // architecture.kv_bytes_per_token
    if tokens < min(_LEAST_TOKENS, capacity.max_sequence_length):
        raise LoadError(
            f"beside the weights there is memory for {tokens} tokens of keys and values: give the worker more memory, "
            "or lower max_memory, prefill_chunk or max_batch_size in setup_config.json"
        )
    logger.warning("memory is left for %d tokens of keys and values instead of %d", tokens, capacity.kv_cache_tokens)
    return settings.model_copy(update={"kv_cache_memory": budget})


def kv_cache_budget(placement: Placement, workspace_bytes: int, copied: int) -> int:
    """Bytes that the keys and values of all layers together may take, or 0.

    workspace_bytes: what a forward needs beside them on each device that computes. The main one also needs room for
        what is streamed through it.
    copied: as in `with_kv_cache_limit`.
    """
    layers = placement.computed_layers
    shares = []
    for device, count in layers.items():
        taken = workspace_bytes + (placement.streaming_bytes if device == placement.main_device else 0)
        if device == "cpu":
            weights = placement.tiers["cpu"].bytes if "cpu" in placement.tiers else 0
            free = free_host_memory(mapped=max(0, weights - copied))
        else:
            free = torch.cuda.mem_get_info(int(device.split()[1]))[0]
        if count:
            usable = max(0, int((free - taken) * (1 - RESERVE)))
            shares.append(usable * sum(layers.values()) // count)
    return min(shares, default=0)


def anonymous_memory() -> int:
    """Bytes of this process that are no pages of a file."""
    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", memory.rss)  # only Linux tells them apart


def free_host_memory(mapped: int) -> int:
    """Bytes that this process can still take without pushing out `mapped` bytes of weights, whose pages count as free.

    Those of the machine, or of a control group that it is in, version 1 or 2, whichever has less.
    """
    return max(0, min(psutil.virtual_memory().available, *_free_in_control_groups()) - mapped)


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
