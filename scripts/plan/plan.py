"""What a plan says, and the figures that follow from it. All sizes in bytes, all times in seconds."""

from dataclasses import asdict, dataclass
from typing import Any

from handler.settings import Settings
from handler.weights.placement import Part

SLACK_BYTES = 1_000_000_000  # of disk: code, logs, sockets


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second at which weights are read. The defaults are round figures of common hardware: measure yours.

    flops: floating-point operations a second of the device that computes; None for 1e11 on a CPU, 5e13 on a GPU.
    """

    disk: float = 1e9
    pcie: float = 12e9
    ram: float = 40e9
    flops: float | None = None


@dataclass(frozen=True)
class Device:
    """What a device will hold, in bytes. size: how much it has; None when that was not named.

    kv_cache, kv_copies: keys and values, and what attention copies of them. workspace: activations, weights on the way,
    and on the CPU what the worker keeps of a vocabulary. runtime: what is there without a model. reserve: what a GPU
    has to keep free, for fragments.
    """

    name: str
    size: int | None
    layers: int
    weights: int
    kv_cache: int = 0
    kv_copies: int = 0
    workspace: int = 0
    runtime: int = 0
    reserve: int = 0

    @property
    def needed(self) -> int:
        return self.weights + self.kv_cache + self.kv_copies + self.workspace + self.runtime + self.reserve

    @property
    def kv_share(self) -> float:
        """How many of its keys and values it has room for, at most 1; below 0 when it lacks room even without them."""
        kept = self.kv_cache + self.kv_copies
        kept += self.reserve * kept // (kept + self.workspace) if kept else 0
        return (kept - self.missing) / kept if kept else float(not self.missing)

    @property
    def missing(self) -> int:
        return 0 if self.size is None else max(0, self.needed - self.size)


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
    ready: int  # of the node's memory, for the worker when it is READY
    serving: dict[int, int]  # of the same with one sequence of full length alone, and with all and full keys and values
    max_sequence_length: int
    kv_bytes_per_token: int
    largest_shard: int
    checkpoint_bytes: int
    offload_bytes: int  # written to offload_folder
    head_groups: int  # into how many equal parts attention can be dealt out
    quantization: str | None  # the method that config.json names
    multiplied: int  # weights that each token is multiplied with
    streamed: dict[str, int]  # bytes read for each step over "disk", "pcie" and "ram", the names in Bandwidth

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
        """Most memory that the node needs while loading: what stays there, and the shard that is being read."""
        return self.cpu.weights + self.cpu.runtime + self.largest_shard

    @property
    def memory_request(self) -> int:
        """What the pod should ask for: while loading or while serving, whichever is more."""
        return max(self.loading, self.cpu.needed)

    def disk_request(self, archive_format: str = "zip-store") -> int:
        """The node's disk for TorchServe's temporary folder; the archive itself (`checkpoint_bytes`) comes on top.

        A .mar is unpacked there, and the model.zip in it is unpacked once more before it is deleted; a no-archive
        folder is served where it lies.
        """
        copies = 2 if archive_format == "zip-store" else 0
        return copies * self.checkpoint_bytes + self.offload_bytes + SLACK_BYTES

    @property
    def seconds_a_step(self) -> float:
        """Least time of a step, from the bytes that are read for it; reads within a GPU's memory are not counted."""
        return sum(count / getattr(self.bandwidth, path) for path, count in self.streamed.items())

    def tokens_per_second(self, requests: int = 1) -> float | None:
        """Most tokens a second of so many requests at once; None when no step waits for weights."""
        return requests / self.seconds_a_step if self.seconds_a_step else None

    @property
    def balanced_rows(self) -> float:
        """At how many rows, tokens of a step, computing takes as long as bringing the weights: up to there more cost
        nothing."""
        flops = self.bandwidth.flops or (5e13 if any(device.needed for device in self.gpus) else 1e11)
        return self.seconds_a_step * flops / (2 * self.multiplied)

    @property
    def recommended_batch_size(self) -> int:
        """A max_batch_size that uses what a step brings: as many rows as cost nothing and as memory has room for, of
        full length."""
        sized = [(device, device.size) for device in self.devices if device.kv_cache and device.size is not None]
        free = [(size - device.needed) / device.kv_cache + 1 for device, size in sized]
        sequence = self.kv_bytes_per_token * self.max_sequence_length
        rows = min([self.balanced_rows, *(share * self.kv_cache / sequence for share in free)])
        return max(1, int(rows))

    @property
    def offloaded(self) -> bool:
        """Whether each step has to bring weights to the device that computes."""
        return any(count for path, count in self.streamed.items() if path != "ram")

    @property
    def missing(self) -> dict[str, int]:
        """Bytes that a device lacks, for those that lack any. The CPU also has to get through the loading."""
        missing = {device.name: device.missing for device in self.devices}
        missing["cpu"] = max(0, self.memory_request - (self.cpu.size or self.memory_request))
        return {name: count for name, count in missing.items() if count}

    @property
    def kv_cache_that_fits(self) -> int:
        """Bytes of keys and values that every device has room for; 0 when a device lacks room even without them."""
        return int(self.kv_cache * max(0.0, min(device.kv_share for device in self.devices)))

    @property
    def verdict(self) -> str:
        if self.missing:
            shortage = ", ".join(f"{gigabytes(count)} on {name}" for name, count in self.missing.items())
            return f"does not fit: {shortage} missing"
        needs = {device.name: device.needed for device in self.gpus} | {"cpu": self.memory_request}
        unsized = [device.name for device in self.devices if device.size is None and needs.get(device.name)]
        condition = "".join(f", given {gigabytes(needs[name])} of {name}" for name in unsized)
        if not self.offloaded:
            return f"fits{condition}"
        one, batch = self.tokens_per_second(), self.settings.max_batch_size
        speed = f"{one:.3g} tok/s for one request, {self.tokens_per_second(batch):.3g} for {batch} at once"
        return f"fits with offload at about {speed}{condition}"

    def as_json(self) -> dict[str, Any]:
        """Everything above under its own name, for other programs."""
        values = asdict(self) | {"settings": self.settings.model_dump(mode="json")}
        for device, values_of_device in zip(self.devices, values["devices"], strict=True):
            values_of_device.update(needed=device.needed, missing=self.missing.get(device.name, 0))
        values["serving"] = {str(sequences): count for sequences, count in self.serving.items()}
        names = ("weights", "kv_cache", "loading", "memory_request", "seconds_a_step", "offloaded", "verdict")
        values |= {name: getattr(self, name) for name in names}
        values |= {name: getattr(self, name) for name in ("balanced_rows", "recommended_batch_size")}
        values["disk_request"] = {name: self.disk_request(name) for name in ("zip-store", "no-archive")}
        batches = sorted({1, self.settings.max_batch_size})
        values["tokens_per_second"] = {str(requests): self.tokens_per_second(requests) for requests in batches}
        return values


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
