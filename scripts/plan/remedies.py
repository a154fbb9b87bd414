"""What to change when a plan does not fit."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .make_plan import make_plan
from .plan import Plan, gigabytes

_SHORTEST = 1024  # tokens of a sequence that is worth serving


def remedies(plan: Plan, model_dir: Path, draft_dir: Path | None = None) -> list[str]:
    """A line for each remedy: settings under which the checkpoint fits, tried out, and the hardware that is lacking.

    An empty list when the plan fits.
    """
    if not plan.missing:
        return []
    fitting = [other for other in _smaller(plan, model_dir, draft_dir) if not other.missing]
    # To leave a GPU without anything is no advice.
    fitting = [other for other in fitting if all(device.needed for device in other.gpus)]
    lines = []
    # For long prompts, and for many: what does not fit are often 32 rows of them.
    whole = [other for other in fitting if other.max_sequence_length == plan.max_sequence_length]
    whole = [other for other in whole if other.settings.kv_cache_memory == plan.settings.kv_cache_memory]
    for others in (fitting, [other for other in whole if other.settings.max_batch_size < plan.settings.max_batch_size]):
        if others:
            best = max(others, key=_merit)
            line = f"with {_changes(plan, best)} in setup_config.json it {best.verdict}"
            lines += [line] if line not in lines else []
    sizes = {device.name: device.size or 0 for device in plan.devices}
    for name, count in plan.missing.items():
        lines.append(f"it fits on {gigabytes(sizes[name] + count)} of {name} instead of {gigabytes(sizes[name])}")
    return lines


def _changes(plan: Plan, other: Plan) -> str:
    """What the other's settings have differently, as lines of setup_config.json."""
    names = ("max_memory", "kv_cache_memory", "max_sequence_length", "max_batch_size")
    changed = {name: getattr(other.settings, name) for name in names}
    changed = {name: value for name, value in changed.items() if value != getattr(plan.settings, name)}
    sizes = {name: _size_setting(value) if "memory" in name else value for name, value in changed.items()}
    return json.dumps(sizes)[1:-1]


def _merit(plan: Plan) -> tuple[bool, int, int, float]:
    """The larger, the better: resident weights before all, then long and many sequences, then tokens a second of as
    many of full length as the KV cache has room for."""
    sequences = plan.kv_cache / (plan.kv_bytes_per_token * plan.max_sequence_length)
    speed = sequences / (plan.seconds_a_step or 1)
    return not plan.offloaded, plan.max_sequence_length, plan.settings.max_batch_size, speed


def _smaller(plan: Plan, model_dir: Path, draft_dir: Path | None) -> Iterator[Plan]:
    """Plans that ask for less: smaller shares of the GPUs for weights, shorter and fewer sequences, each also with the
    KV cache that fits beside."""
    gpus, cpu = [device.size for device in plan.gpus], plan.cpu.size
    sizes = [size for size in gpus if size is not None]
    candidates = [plan.settings]
    for tenths in range(9, 0, -1) if sizes else ():
        limits: dict[int | str, int] = {index: size * tenths // 10 for index, size in enumerate(sizes)}
        limits["cpu"] = plan.weights * 11 // 10 if cpu is None else max(0, cpu - plan.cpu.runtime)
        candidates.append(plan.settings.model_copy(update={"max_memory": _rounded(limits)}))
    for name, value, least in (
        ("max_sequence_length", plan.max_sequence_length, _SHORTEST),
        ("max_batch_size", plan.settings.max_batch_size, 1),
    ):
        while (value := value // 2) >= least:
            candidates.append(plan.settings.model_copy(update={name: value}))
    for settings in candidates:
        other = make_plan(model_dir, settings, gpus, cpu, plan.bandwidth, draft_dir)
        yield other
        kv_cache = _rounded(other.kv_cache_that_fits)
        if other.missing and kv_cache >= other.kv_bytes_per_token * other.max_sequence_length:
            settings = settings.model_copy(update={"kv_cache_memory": kv_cache})
            yield make_plan(model_dir, settings, gpus, cpu, plan.bandwidth, draft_dir)


def _rounded(size: Any) -> Any:
    """Rounded down to two digits, so that a person can write it."""
    if isinstance(size, dict):
        return {device: _rounded(count) for device, count in size.items()}
    unit = 10 ** max(0, len(str(size)) - 2)
    return size // unit * unit


def _size_setting(size: Any) -> Any:
    """A size as a person writes it in setup_config.json."""
    if isinstance(size, dict):
        return {str(device): _size_setting(count) for device, count in size.items()}
    return f"{size / 1e9:g}GB"
