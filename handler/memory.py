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
from handler.weights.placement import Tier

logger = logging.getLogger(__name__)

RESERVE = 0.1  # of what is left, for fragmentation and what nobody foresees
_LEAST_TOKENS = 128  # of keys and values, for a model that is worth serving


def with_kv_cache_limit(settings: Settings, loaded: LoadedModel) -> Settings:
    """The settings with a limit on keys and values, where they name none and memory is too small for the default.

    Raises LoadError when there is no room for them beside the weights.
    """
    architecture = Architecture.of(loaded.model)
    capacity = Capacity.of(architecture, settings)
    budget = kv_cache_budget(loaded.tiers, capacity.workspace_bytes)
    if settings.kv_cache_memory is not None or capacity.kv_cache_bytes <= budget:
        return settings
    tokens, default = budget // architecture.kv_bytes_per_token, capacity.kv_cache_tokens
    if tokens < min(_LEAST_TOKENS, capacity.max_sequence_length):
        raise LoadError(
            f"beside the weights there is memory for {tokens} tokens of keys and values: give the worker more memory, "
            "or lower max_memory, prefill_chunk or max_batch_size in setup_config.json"
        )
    logger.warning("memory is left for %d tokens of keys and values instead of %d", tokens, default)
    return settings.model_copy(update={"kv_cache_memory": budget})


def kv_cache_budget(tiers: dict[str, Tier], workspace_bytes: int) -> int:
    """Bytes that the keys and values of all layers together may take, or 0.

    tiers: what each device holds. A layer's keys and values are where it is computed: on its GPU, else on the first
        GPU, else on the CPU.
    workspace_bytes: what a forward needs beside them on each of those devices.
    """
    gpus = [name for name in tiers if name.startswith("gpu")]
    if not gpus:
        cpu = tiers.get("cpu", Tier(0, 0))
        return _usable(free_host_memory(cpu.bytes), workspace_bytes)
    layers = {name: tiers[name].layers for name in gpus}
    layers[gpus[0]] += sum(tier.layers for name, tier in tiers.items() if name not in gpus)
    free = {name: torch.cuda.mem_get_info(int(name.split()[1]))[0] for name in gpus}
    shares = [(_usable(free[name], workspace_bytes), count) for name, count in layers.items() if count]
    return min((usable * sum(layers.values()) // count for usable, count in shares), default=0)


def free_host_memory(weights: int) -> int:
    """Bytes that this process can still take without pushing out `weights` bytes on the CPU, mapped or copied.

    Those of the machine, or of a control group that it is in, version 1 or 2, whichever has less.
    """
    own = psutil.Process().memory_info()
    mapped = max(0, weights - (own.rss - own.shared))  # pages of a file count as free everywhere
    return max(0, min(psutil.virtual_memory().available, *_free_in_control_groups()) - mapped)


def _usable(free: int, workspace_bytes: int) -> int:
    return max(0, int((free - workspace_bytes) * (1 - RESERVE)))


def _free_in_control_groups(root: Path = Path("/sys/fs/cgroup"), of: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What each group with a limit has left; its page cache counts as free."""
    free = []
    for line in of.read_text().splitlines() if of.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version_2 = not controllers
        limit_name, used_name = ("memory.max", "anon") if version_2 else ("memory.limit_in_bytes", "total_rss")
        folder, group = root if version_2 else root / "memory", Path(path.strip("/"))
        # The groups above count too. A container may see its own as the root, under the path that it has outside.
        for parent in (group, *group.parents):
            limit, statistics = folder / parent / limit_name, folder / parent / "memory.stat"
            if limit.is_file() and statistics.is_file() and limit.read_text().strip().isdecimal():
                used = dict(line.split() for line in statistics.read_text().splitlines())
                free.append(int(limit.read_text()) - int(used[used_name]))
    return free
