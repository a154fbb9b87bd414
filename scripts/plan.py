"""Where each layer of a checkpoint will go, whether that fits and how fast it can be, before anything is loaded.

The map is the loader's own, computed on the meta device for the hardware that is named, not for the hardware here.
A folder with nothing but config.json in it is enough.
"""

import argparse
import json
import logging
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.accelerate import _get_device_map
from transformers.modeling_utils import get_state_dict_dtype, load_state_dict

from handler.engine import UnsupportedModel
from handler.engine.architecture import Architecture
from handler.engine.capacity import Capacity
from handler.errors import LoadError
from handler.loading import read_config
from handler.settings import Settings, parse_size, read_settings
from handler.weights.placement import decoder_layer, device_map, max_memory, placement
from scripts.archive import ROOT
from scripts.console import UserError, run

# Java and a worker with an imported torch, without a model: 0.75 GB resident, and Java's heap may grow to 1 GB.
RUNTIME_BYTES = 1_500_000_000
SHARD_BYTES = 2_000_000_000  # MAX_SHARD_SIZE of `make shard`, for a folder without weights
SLACK_BYTES = 1_000_000_000  # of disk: code, logs, sockets
HEADROOM = 0.9  # of a GPU, which Accelerate fills when it is the only one and max_memory does not say
UNLIMITED = 2**62


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second that weights are read at. The defaults are round figures of common hardware: measure yours."""

    disk: float = 1e9
    pcie: float = 12e9
    ram: float = 40e9


@dataclass(frozen=True)
class Device:
    """What a device holds, in bytes. size: what it has, or None when that was not said."""

    name: str
    size: int | None
    layers: int
    weights: int
    kv_cache: int = 0
    workspace: int = 0
    runtime: int = 0

    @property
    def needed(self) -> int:
        return self.weights + self.kv_cache + self.workspace + self.runtime

    @property
    def missing(self) -> int:
        return 0 if self.size is None else max(0, self.needed - self.size)


@dataclass(frozen=True)
class Part:
    """A decoder layer, or what is outside of them: its name, device and bytes."""

    name: str
    device: str
    bytes: int

    @property
    def is_layer(self) -> bool:
        return decoder_layer(f"{self.name}.") is not None


@dataclass(frozen=True)
class Plan:
    """All sizes in bytes, all times in seconds."""

    model: str
    dtype: str
    settings: Settings
    bandwidth: Bandwidth
    device_map: dict[str, int | str]
    parts: list[Part]
    devices: list[Device]
    max_sequence_length: int
    kv_bytes_per_token: int
    largest_shard: int
    checkpoint_bytes: int
    offload_bytes: int  # that are written to offload_folder
    streamed: dict[str, int]  # bytes a step, by the way they come: disk, pcie, ram

    @property
    def weights(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def kv_cache(self) -> int:
        return sum(device.kv_cache for device in self.devices)

    @property
    def gpus(self) -> list[Device]:
        return [device for device in self.devices if device.name.startswith("gpu")]

    @property
    def cpu(self) -> Device:
        return next(device for device in self.devices if device.name == "cpu")

    @property
    def loading(self) -> int:
        """Most memory of the node while loading: what stays there, and the shard that is being read."""
        return self.cpu.weights + self.cpu.runtime + self.largest_shard

    @property
    def memory_request(self) -> int:
        """What the pod should ask for: while loading or while serving, whichever is more."""
        return max(self.loading, self.cpu.needed)

    def disk_request(self, archive_format: str = "zip-store") -> int:
        """Disk of the node for TorchServe's temporary folder, beside the archive itself (`checkpoint_bytes`).

        A .mar is unpacked there, and the model.zip in it is unpacked once more before it is deleted; a no-archive
        folder is served where it lies.
        """
        copies = 2 if archive_format == "zip-store" else 0
        return copies * self.checkpoint_bytes + self.offload_bytes + SLACK_BYTES

    @property
    def seconds_a_step(self) -> float:
        """Least time of a step, from the bytes that have to be brought for it; GPUs' own memory is not counted."""
        return sum(count / getattr(self.bandwidth, way) for way, count in self.streamed.items())

    def tokens_per_second(self, requests: int = 1) -> float | None:
        """Most tokens a second of so many requests at once; None when nothing has to be brought."""
        return requests / self.seconds_a_step if self.seconds_a_step else None

    @property
    def offloaded(self) -> bool:
        """Whether weights are brought to the device that computes for each step."""
        return any(count for way, count in self.streamed.items() if way != "ram")

    @property
    def missing(self) -> dict[str, int]:
        lacking = {device.name: device.missing for device in self.devices}
        lacking["cpu"] = max(0, self.memory_request - (self.cpu.size or self.memory_request))
        return {name: count for name, count in lacking.items() if count}

    @property
    def kv_cache_that_fits(self) -> int:
        """Bytes of keys and values for which every device has room; 0 when one has none even without them."""
        shares = [(d.kv_cache - d.missing) / d.kv_cache if d.kv_cache else float(not d.missing) for d in self.devices]
        return int(self.kv_cache * max(0.0, min(shares)))

    @property
    def verdict(self) -> str:
        if self.missing:
            lacking = ", ".join(f"{gigabytes(count)} on {name}" for name, count in self.missing.items())
            return f"does not fit: {lacking} missing"
        needs = {device.name: device.needed for device in self.gpus} | {"cpu": self.memory_request}
        unnamed = [device.name for device in self.devices if device.size is None and needs.get(device.name)]
        given = "".join(f", given {gigabytes(needs[name])} of {name}" for name in unnamed)
        if not self.offloaded:
            return f"fits{given}"
        most = self.settings.max_batch_size
        one, all_of_them = self.tokens_per_second(), self.tokens_per_second(most)
        return (
            f"fits with offload at about {one:.3g} tok/s for one request, {all_of_them:.3g} for {most} at once{given}"
        )

    def as_json(self) -> dict[str, Any]:
        """Everything above under its own name, for other programs."""
        values = asdict(self) | {"settings": self.settings.model_dump(mode="json")}
        for device, values_of_device in zip(self.devices, values["devices"], strict=True):
            values_of_device.update(needed=device.needed, missing=self.missing.get(device.name, 0))
        names = ("weights", "kv_cache", "loading", "memory_request", "seconds_a_step", "offloaded", "verdict")
        values |= {name: getattr(self, name) for name in names}
        values["disk_request"] = {name: self.disk_request(name) for name in ("zip-store", "no-archive")}
        most = self.settings.max_batch_size
        values["tokens_per_second"] = {str(n): self.tokens_per_second(n) for n in sorted({1, most})}
        return values


def plan(
    model_dir: Path,
    settings: Settings,
    gpus: Sequence[int | None] | None = None,
    cpu: int | None = None,
    bandwidth: Bandwidth = Bandwidth(),
) -> Plan:
    """Place the checkpoint in `model_dir` on `gpus` (bytes each) and `cpu` bytes, as load_model would.

    gpus: None takes those that max_memory names, of any size. cpu: None is as much as needed.
    Raises UserError for a folder that holds no causal language model, or one that the engine cannot run.
    """
    try:
        with _quiet():
            return _plan(model_dir, settings, gpus, cpu, bandwidth)
    except (LoadError, UnsupportedModel) as error:
        raise UserError(str(error)) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Accelerate says of GPUs that are not here, and the loader of those that are not named."""
    loggers = [logging.getLogger(name) for name in ("accelerate", "handler")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _plan(
    model_dir: Path, settings: Settings, gpus: Sequence[int | None] | None, cpu: int | None, bandwidth: Bandwidth
) -> Plan:
    if gpus is None:
        gpus = [None] * len([device for device in settings.max_memory or {} if isinstance(device, int)])
    kinds = [sorted(model_dir.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin")]
    files = next((files for files in kinds if files), [])  # what the loader prefers
    model = meta_model(read_config(model_dir, settings), settings, files)
    placed = _place(model, settings, gpus, cpu)
    parts = _parts(model, placed)
    architecture = Architecture.of(model)
    limits = Capacity.of(architecture, settings)
    stored = sum(path.stat().st_size for path in files)
    archived = sum(path.stat().st_size for files in kinds for path in files)
    weights = sum(part.bytes for part in parts)
    on_disk = sum(part.bytes for part in parts if part.device == "disk")
    in_place = not files or files[0].suffix == ".safetensors"
    return Plan(
        model=model.config.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        settings=settings,
        bandwidth=bandwidth,
        device_map=placed,
        parts=parts,
        devices=_devices(parts, limits, gpus, cpu),
        max_sequence_length=limits.max_sequence_length,
        kv_bytes_per_token=architecture.kv_bytes_per_token,
        largest_shard=max((path.stat().st_size for path in files), default=min(weights, SHARD_BYTES)),
        checkpoint_bytes=archived or weights,
        offload_bytes=0 if in_place else on_disk,
        # Safetensors are read as they are stored, which may be wider than what is computed in.
        streamed=_streamed(model, parts, stored / weights if stored and in_place else 1.0),
    )


def remedies(made: Plan, model_dir: Path) -> list[str]:
    """What to change when a plan does not fit: settings under which it would, tried, and the hardware it lacks."""
    if not made.missing:
        return []
    fitting = [other for other in _smaller(made, model_dir) if not other.missing]
    # A GPU that is left with nothing is no advice.
    fitting = [other for other in fitting if all(device.needed for device in other.gpus)]
    lines = []
    if fitting:
        best = max(fitting, key=_merit)
        changed = {name: getattr(best.settings, name) for name in ("max_memory", "kv_cache_memory")}
        changed = {name: value for name, value in changed.items() if value != getattr(made.settings, name)}
        text = json.dumps({name: _size_setting(value) for name, value in changed.items()})[1:-1]
        lines.append(f"with {text} in setup_config.json it {best.verdict}")
    sizes = {device.name: device.size or 0 for device in made.devices}
    for name, count in made.missing.items():
        lines.append(f"it fits on {gigabytes(sizes[name] + count)} of {name} instead of {gigabytes(sizes[name])}")
    return lines


def _merit(made: Plan) -> tuple[bool, float]:
    """Resident weights first, then tokens a second of as many whole sequences as there are keys and values for."""
    sequences = made.kv_cache / (made.kv_bytes_per_token * made.max_sequence_length)
    return not made.offloaded, sequences / (made.seconds_a_step or 1)


def _smaller(made: Plan, model_dir: Path) -> Iterator[Plan]:
    """Plans that ask for less: other shares of the GPUs for weights, each with the keys and values that fit beside."""
    gpus, cpu = [device.size for device in made.gpus], made.cpu.size
    sizes = [size for size in gpus if size is not None]
    candidates = [made.settings]
    for tenths in range(9, 0, -1) if sizes else ():
        limits: dict[int | str, int] = {index: size * tenths // 10 for index, size in enumerate(sizes)}
        limits["cpu"] = made.weights * 11 // 10 if cpu is None else max(0, cpu - RUNTIME_BYTES)
        candidates.append(made.settings.model_copy(update={"max_memory": _rounded(limits)}))
    for settings in candidates:
        other = plan(model_dir, settings, gpus, cpu, made.bandwidth)
        yield other
        kv_cache = _rounded(other.kv_cache_that_fits)
        if other.missing and kv_cache >= other.kv_bytes_per_token * other.max_sequence_length:
            settings = settings.model_copy(update={"kv_cache_memory": kv_cache})
            yield plan(model_dir, settings, gpus, cpu, made.bandwidth)


def _rounded(size: Any) -> Any:
    """Down to two digits, so that a person can write it."""
    if isinstance(size, dict):
        return {device: _rounded(count) for device, count in size.items()}
    unit = 10 ** max(0, len(str(size)) - 2)
    return size // unit * unit


def _size_setting(size: Any) -> Any:
    """A size as a person writes it in setup_config.json."""
    if isinstance(size, dict):
        return {str(device): _size_setting(count) for device, count in size.items()}
    return f"{size / 1e9:g}GB"


def meta_model(config: PreTrainedConfig, settings: Settings, files: Sequence[Path] = ()) -> PreTrainedModel:
    """The model without weights, in the dtype that the loader would choose."""
    dtype = getattr(torch, settings.dtype) if settings.dtype != "auto" else config.dtype or _stored_dtype(files)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=settings.trust_remote_code)
    model.tie_weights()
    return model.eval()


def _stored_dtype(files: Sequence[Path]) -> torch.dtype:
    """As from_pretrained finds it when the config names none: from the first file's headers, reading no weights."""
    return get_state_dict_dtype(load_state_dict(files[0], map_location="meta")) if files else torch.float32


def _place(
    model: PreTrainedModel, settings: Settings, gpus: Sequence[int | None], cpu: int | None
) -> dict[str, int | str]:
    limits = max_memory(settings, len(gpus))
    if limits is None:
        share = HEADROOM if len(gpus) == 1 else 1
        limits = {index: UNLIMITED if size is None else int(size * share) for index, size in enumerate(gpus)}
        limits["cpu"] = UNLIMITED if cpu is None else int(cpu * HEADROOM)
    return _get_device_map(model, device_map(settings, len(gpus)), limits, None)


def _parts(model: PreTrainedModel, placed: dict[str, int | str]) -> list[Part]:
    """Decoder layers, and the modules with weights of their own outside of them, in the model's order."""
    sizes: dict[tuple[str, str], int] = defaultdict(int)
    for name, device, count in placement(model, placed):
        sizes[decoder_layer(name) or name.rpartition(".")[0], device] += count
    return [Part(name, device, count) for (name, device), count in sizes.items()]


def _devices(parts: list[Part], limits: Capacity, gpus: Sequence[int | None], cpu: int | None) -> list[Device]:
    """GPUs, CPU and disk with what they hold. A layer's keys and values live where it is computed."""
    layers = {part.name: part.device for part in parts if part.is_layer}
    main = _main_device(parts)
    computed = [device if device.startswith("gpu") else main for device in layers.values()]
    streamed = [part.bytes for part in parts if _is_streamed(part, main)]
    devices = []
    for name, size in [*((f"gpu {index}", size) for index, size in enumerate(gpus)), ("cpu", cpu), ("disk", None)]:
        works = name == main or name in computed
        devices.append(
            Device(
                name=name,
                size=size,
                layers=sum(1 for device in layers.values() if device == name),
                weights=sum(part.bytes for part in parts if part.device == name),
                kv_cache=limits.kv_cache_bytes * computed.count(name) // max(1, len(layers)),
                workspace=(limits.workspace_bytes if works else 0) + (max(streamed, default=0) if name == main else 0),
                runtime=RUNTIME_BYTES if name == "cpu" else 0,
            )
        )
    return devices


def _main_device(parts: list[Part]) -> str:
    """Where Accelerate computes the layers that are on "cpu" or "disk": the first GPU of the map, if there is one."""
    return next((part.device for part in parts if part.device.startswith("gpu")), "cpu")


def _is_streamed(part: Part, main: str) -> bool:
    return part.device == "disk" or (part.device == "cpu" and main != "cpu")


def _streamed(model: PreTrainedModel, parts: list[Part], stored: float) -> dict[str, int]:
    """Bytes that a step brings over the disk, over PCIe and from the node's memory.

    stored: bytes on disk for each byte in memory.
    """
    main = _main_device(parts)
    ways = {"disk": 0, "pcie": 0, "ram": 0}
    for part in parts:
        if part.device == "disk":
            ways["disk"] += int(part.bytes * stored)
        if _is_streamed(part, main) and main != "cpu":
            ways["pcie"] += part.bytes
        if main == "cpu" and not _is_looked_up(model, part):
            ways["ram"] += part.bytes
    return ways


def _is_looked_up(model: PreTrainedModel, part: Part) -> bool:
    """An input embedding that is in memory and not the output's too: a step reads a row a token."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = outputs is not None and outputs.weight is inputs.weight
    return not tied and part.device != "disk" and model.get_submodule(part.name) is inputs


def parse_gpus(text: str) -> list[int]:
    """Bytes of each GPU in `2x16GiB`, `16GiB,24GiB` or `0` (none). Raises UserError for anything else."""
    sizes: list[int] = []
    for part in text.split(",") if text.strip() not in ("", "0") else ():
        match = re.fullmatch(r"\s*(?:(\d+)\s*x)?(.+)", part)
        try:
            sizes += [parse_size(match[2])] * int(match[1] or 1)  # type: ignore[index]
        except (ValueError, TypeError):
            raise UserError(f"GPUS is {text!r}: write 2x16GiB, or 16GiB,24GiB, or 0 for none") from None
    return sizes


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def report(made: Plan) -> str:
    """The plan as a table for people, and its verdict."""
    rows = [["", "has", "layers", "weights", "KV cache", "workspace", "runtime", "left"]]
    for device in made.devices:
        sizes = [device.weights, device.kv_cache, device.workspace, device.runtime]
        left = "" if device.size is None else gigabytes(device.size - device.needed)
        has = "" if device.size is None else gigabytes(device.size)
        rows.append([device.name, has, str(device.layers), *(gigabytes(s) if s else "" for s in sizes), left])
    tokens = made.kv_cache // made.kv_bytes_per_token
    lines = [
        f"{made.model}, {made.dtype}, {gigabytes(made.weights)} of weights",
        "",
        _aligned(rows),
        "",
        f"keys and values  {tokens:,} tokens of {made.kv_bytes_per_token:,} bytes: "
        f"{made.settings.max_batch_size} sequences of up to {made.max_sequence_length:,} tokens",
        f"node's memory    {gigabytes(made.memory_request)}, of it while loading {gigabytes(made.loading)}",
        f"node's disk      {gigabytes(made.checkpoint_bytes)} for the archive, and in /tmp "
        f"{gigabytes(made.disk_request())} for a .mar, {gigabytes(made.disk_request('no-archive'))} for a folder",
    ]
    if made.seconds_a_step:
        ways = ", ".join(
            f"{gigabytes(count)} over {way} at {getattr(made.bandwidth, way) / 1e9:g} GB/s"
            for way, count in made.streamed.items()
            if count
        )
        most = made.settings.max_batch_size
        lines.append(
            f"a step brings    {ways}: at most {made.tokens_per_second():.3g} tok/s for one request, "
            f"{made.tokens_per_second(most):.3g} for {most}"
        )
    idle = [device.name for device in made.gpus if not device.needed]
    if idle:
        lines.append(f"idle             {', '.join(idle)}: max_memory in setup_config.json does not name it")
    return "\n".join([*lines, "", f"verdict          {made.verdict}"])


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)


def picture(made: Plan, path: Path) -> None:
    """Draw the layers on their devices; the suffix of `path` says in what format (.svg, .png)."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    colors = {"layers": "#4477aa", "outside": "#ccbb44", "KV cache": "#66ccee", "other": "#bbbbbb"}
    figure, axes = pyplot.subplots(figsize=(11, 1.4 + 0.7 * len(made.devices)), layout="constrained")
    for row, device in enumerate(made.devices):
        end = 0.0
        held = [part for part in made.parts if part.device == device.name]
        blocks = [(part.bytes, "layers" if part.is_layer else "outside") for part in held]
        blocks += [(device.kv_cache, "KV cache"), (device.workspace + device.runtime, "other")]
        for count, kind in blocks:
            axes.barh(row, count / 1e9, left=end, color=colors[kind], edgecolor="white", linewidth=0.5)
            end += count / 1e9
        if device.size is not None:
            axes.plot([device.size / 1e9] * 2, [row - 0.45, row + 0.45], color="#ee6677", linewidth=2)
    labels = {"layers": "decoder layers", "outside": "embeddings, norms, head", "other": "workspace and runtime"}
    handles = [Patch(color=color, label=labels.get(kind, kind)) for kind, color in colors.items()]
    handles.append(Patch(color="#ee6677", label="what the device has"))
    axes.legend(
        handles=handles,
        ncols=len(handles),
        frameon=False,
        fontsize=8,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
    )
    axes.set_yticks(range(len(made.devices)), [device.name for device in made.devices])
    axes.invert_yaxis()
    axes.set_xlabel("GB")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{made.model}, {made.dtype}: {made.verdict}", fontsize=10)
    figure.savefig(path)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="plan", description=__doc__.splitlines()[0])
    parser.add_argument("--model-dir", type=Path, required=True, help="a checkpoint, or a folder with its config.json")
    parser.add_argument("--gpus", help="2x16GiB; 16GiB,24GiB; 0 for none; without it those of max_memory")
    parser.add_argument("--cpu", help="the node's memory, such as 32GiB; without it as much as needed")
    parser.add_argument("--setup-config", type=Path, default=ROOT / "setup_config.json")
    parser.add_argument("--disk-bandwidth", default="1GB", help="bytes a second (default: %(default)s)")
    parser.add_argument("--pcie-bandwidth", default="12GB", help="bytes a second (default: %(default)s)")
    parser.add_argument("--ram-bandwidth", default="40GB", help="bytes a second (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the plan here as JSON")
    parser.add_argument("--picture", type=Path, help="draw the plan here: .svg or .png")
    given = parser.parse_args(argv)
    if not given.setup_config.is_file():
        raise UserError(f"{given.setup_config} does not exist: name the setup_config.json to plan for")
    gpus = None if given.gpus is None else parse_gpus(given.gpus)
    cpu = None if given.cpu is None else size_option("CPU", given.cpu)
    speeds = {name: size_option(name, getattr(given, f"{name}_bandwidth")) for name in ("disk", "pcie", "ram")}
    made = plan(given.model_dir, read_settings(given.setup_config), gpus, cpu, Bandwidth(**speeds))
    print(report(made))
    for remedy in remedies(made, given.model_dir):
        print(f"                 {remedy}")
    if given.json:
        given.json.write_text(json.dumps(made.as_json(), indent=2) + "\n")
    if given.picture:
        picture(made, given.picture)
    if written := [str(path) for path in (given.json, given.picture) if path]:
        print(f"\nwrote {' and '.join(written)}")


def size_option(name: str, text: str) -> int:
    """A size on the command line. Raises UserError, in one line."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise UserError(f"{name} is {text!r}; allowed: {error}") from None


if __name__ == "__main__":
    sys.exit(run(main))
