"""A checkpoint's configuration and a machine's sizes -> a plan.

The device map is the loader's own, computed on the meta device for the hardware that is named, not for the hardware
here. A folder with nothing but config.json in it is enough.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from handler.engine import UnsupportedModel
from handler.engine.architecture import Architecture
from handler.engine.capacity import KERNEL_BYTES, Capacity, kv_copy_bytes
from handler.engine.draft_model import DraftModel
from handler.engine.kv_cache import COLUMN_STEP, replayed_step, with_spare_columns
from handler.errors import CheckpointError, LoadError
from handler.loading import meta_model, read_config
from handler.memory import JAVA_BYTES, RESERVE, device_limits, limits_beside_draft
from handler.settings import Settings
from handler.weights.files import weight_files
from handler.weights.placement import Placement, Tier, max_memory, settled_map, weight_bytes
from scripts.console import UserError

from .plan import Bandwidth, Device, Plan

# A worker without a model: 300 MB of its own, and 200 MB of libraries' pages, LLVM's among them.
WORKER_BYTES = 500_000_000
RUNTIME_BYTES = JAVA_BYTES + WORKER_BYTES
# In tokenizer and grammars, for each token (355) and each byte of tokenizer.json (9.7 to 11), measured with 49,152 to
# 250,680 tokens; and bytes of that file a token, where it is not there yet.
TOKEN_BYTES, TOKENIZER_GROWTH, TOKENIZER_BYTES_A_TOKEN = 360, 11, 72
_LEAST_TOKENIZER = 1024
# When it is READY: what the check of the model's rows leaves, of two numbers of rows and up to eight kinds of matrix.
CHECK_BYTES = 16 * KERNEL_BYTES
STREAMING_BYTES = 25_000_000  # small tensors of the disk tier, which stay, threads that read, Accelerate's hooks
INTEGERS_BYTES = 15_000_000  # float32 scales and sums of rows beside matrices of integers
# CUDA's libraries and context in the host's memory, once the worker uses a GPU; and its context and the workspace of
# its matrix library in the GPU's. Round figures for the wheels of torch 2.13; nvidia-smi shows yours.
GPU_HOST_BYTES, GPU_CONTEXT_BYTES = 2_000_000_000, 600_000_000
# Tokens of keys and values that a plan asks for in each row, where nobody set kv_cache_memory: the engine takes what
# memory is left for, up to rows of full length, which for a long-context model may be more than any machine has.
TOKENS_A_ROW = 2048
SHARD_BYTES = 2_000_000_000  # MAX_SHARD_SIZE of `make shard`, for a folder without weights
UNLIMITED = 2**62
ARCHIVED = ("*.safetensors", "pytorch_model*.bin")  # all weights are archived, also those that the loader passes over


def make_plan(
    model_dir: Path,
    settings: Settings,
    gpus: Sequence[int | None] | None = None,
    cpu: int | None = None,
    bandwidth: Bandwidth | None = None,
    draft_dir: Path | None = None,
) -> Plan:
    """Place the checkpoint in `model_dir` on `gpus` (bytes each) and `cpu` bytes, as load_model would, and the draft
    model in `draft_dir` beside it, where it is of use.

    gpus: None takes those that max_memory names, of any size. cpu: None is as much as needed.
    Raises UserError for a folder that holds no causal language model, or one that the engine cannot run.
    """
    try:
        with _quiet():
            return _make_plan(model_dir, settings, gpus, cpu, bandwidth or Bandwidth(), draft_dir)
    except (LoadError, UnsupportedModel) as error:
        raise UserError(str(error)) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings about GPUs: Accelerate's, that this machine lacks them, and the loader's, that max_memory names
    more of them than the plan has."""
    loggers = [logging.getLogger(name) for name in ("accelerate", "handler")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _make_plan(
    model_dir: Path,
    settings: Settings,
    gpus: Sequence[int | None] | None,
    cpu: int | None,
    bandwidth: Bandwidth,
    draft_dir: Path | None,
) -> Plan:
    if gpus is None:
        gpus = [None] * len([device for device in settings.max_memory or {} if isinstance(device, int)])
    files = _weight_files(model_dir)
    model = meta_model(read_config(model_dir, settings), settings, files)
    draft_files = _weight_files(draft_dir) if draft_dir else []
    archived = _archived(model_dir, model)
    draft = None
    if draft_dir:
        draft = meta_model(read_config(draft_dir, settings), settings, draft_files)
        archived += _archived(draft_dir, draft)
    placed, draft = _place(model, settings, gpus, cpu, draft if settings.num_speculative_tokens else None)
    placement = Placement.of(model, placed)
    architecture, config = Architecture.of(model), model.config.get_text_config()
    capacity = _capacity(architecture, settings)
    stored = sum(path.stat().st_size for path in files)
    weights = sum(part.bytes for part in placement.parts)
    on_disk = sum(part.bytes for part in placement.parts if part.device == "disk")
    beside = placement.with_draft(draft, DraftModel.cache_bytes(draft)) if draft else placement
    shards = [path.stat().st_size for path in [*files, *(draft_files if draft else ())]]
    in_place = not files or files[0].suffix == ".safetensors"
    quantization = (getattr(model.config, "quantization_config", None) or {}).get("quant_method")
    computes = placement.main_device == "cpu"
    kept = _vocabulary_bytes(model_dir, architecture.vocab_size) + (INTEGERS_BYTES if quantization and computes else 0)
    kept += STREAMING_BYTES if placement.read_ahead_bytes else 0
    devices = _devices(beside, capacity, gpus, cpu, kept)
    host = next(device for device in devices if device.name == "cpu")
    return Plan(
        model=model.config.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        settings=settings,
        bandwidth=bandwidth,
        device_map=placed,
        parts=beside.parts,
        devices=devices,
        ready=_ready(beside, host, kept),
        serving=_serving(beside, host, architecture, capacity, settings),
        max_sequence_length=capacity.max_sequence_length,
        kv_bytes_per_token=architecture.kv_bytes_per_token,
        largest_shard=max(shards, default=min(weights, SHARD_BYTES)),
        checkpoint_bytes=archived,
        offload_bytes=0 if in_place else on_disk,
        head_groups=math.gcd(config.num_attention_heads, getattr(config, "num_key_value_heads", None) or 0),
        quantization=quantization,
        multiplied=_multiplied(model, placement),
        # Safetensors are read as they are stored, which may be wider than what is computed in.
        streamed=_streamed(placement, stored / weights if stored and in_place else 1.0),
    )


def _capacity(architecture: Architecture, settings: Settings) -> Capacity:
    """With as many keys and values as the model is worth serving with: one row of full length, or all with
    TOKENS_A_ROW each."""
    capacity = Capacity.of(architecture, settings)
    if settings.kv_cache_memory is not None:
        return capacity
    tokens = max(capacity.max_sequence_length, settings.max_batch_size * TOKENS_A_ROW)
    limit = tokens * architecture.kv_bytes_per_token
    return Capacity.of(architecture, settings.model_copy(update={"kv_cache_memory": limit}))


def _weight_files(model_dir: Path) -> list[Path]:
    """The files that the loader reads; none when the folder does not hold all of them, as before a download."""
    try:
        return weight_files(model_dir)
    except CheckpointError:
        return []


def _vocabulary_bytes(model_dir: Path, vocab_size: int) -> int:
    """Bytes of the host's memory that tokenizer and grammars keep of a vocabulary."""
    file = model_dir / "tokenizer.json"
    size = file.stat().st_size if file.is_file() else 0
    if size < _LEAST_TOKENIZER:  # not there yet, or a pointer to where it lies
        size = vocab_size * TOKENIZER_BYTES_A_TOKEN
    return vocab_size * TOKEN_BYTES + size * TOKENIZER_GROWTH


def _archived(folder: Path, model: PreTrainedModel) -> int:
    """Bytes of weights in the folder of a model; those that it will have, where there are none yet."""
    stored = sum(path.stat().st_size for pattern in ARCHIVED for path in folder.glob(pattern))
    return stored or weight_bytes(model)


def _place(
    model: PreTrainedModel,
    settings: Settings,
    gpus: Sequence[int | None],
    cpu: int | None,
    draft: PreTrainedModel | None,
) -> tuple[dict[str, int | str], PreTrainedModel | None]:
    """The device map, and the draft model if it is of use."""
    free: dict[int | str, int] = {
        index: UNLIMITED if size is None else max(0, size - GPU_CONTEXT_BYTES) for index, size in enumerate(gpus)
    }
    free["cpu"] = UNLIMITED if cpu is None else max(0, cpu - RUNTIME_BYTES - (GPU_HOST_BYTES if gpus else 0))
    beside = limits_beside_draft(model, settings, free, draft) if draft else None
    limits = beside or max_memory(settings, len(gpus)) or device_limits(model, settings, free)
    return settled_map(settings, len(gpus), model, limits), draft if beside else None


def _devices(
    placement: Placement, capacity: Capacity, gpus: Sequence[int | None], cpu: int | None, kept: int
) -> list[Device]:
    """GPUs, CPU and disk with what they will hold. A layer's keys and values live where it is computed.

    kept: bytes of the host's memory that the worker keeps beside weights, whatever it serves.
    """
    computed, none = placement.computed_layers, Tier(0, 0)
    num_layers = max(1, sum(computed.values()))
    devices = []
    for name, size in [*((f"gpu {index}", size) for index, size in enumerate(gpus)), ("cpu", cpu), ("disk", None)]:
        tier = placement.tiers.get(name, none)
        workspace = capacity.activation_bytes_on(name) if name in computed else 0
        workspace += placement.main_device_bytes + placement.small_bytes if name == placement.main_device else 0
        workspace += placement.read_ahead_bytes if name == "cpu" != placement.main_device else 0
        kv_cache = capacity.kv_cache_bytes * computed.get(name, 0) // num_layers
        kv_copies = capacity.kv_copy_bytes if name in computed else 0
        runtime = reserve = 0
        if name == "cpu":
            runtime = RUNTIME_BYTES + (GPU_HOST_BYTES if gpus else 0)
            workspace += kept
        elif name in computed:  # the engine leaves as much free, and fragments of PyTorch's allocator take it
            runtime = GPU_CONTEXT_BYTES
            reserve = int((kv_cache + kv_copies + workspace) * RESERVE / (1 - RESERVE))
        devices.append(
            Device(
                name=name,
                size=size,
                layers=tier.layers,
                weights=tier.bytes,
                kv_cache=kv_cache,
                kv_copies=kv_copies,
                workspace=workspace,
                runtime=runtime,
                reserve=reserve,
            )
        )
    return devices


def _ready(placement: Placement, cpu: Device, kept: int) -> int:
    """Bytes of the host's memory that the worker takes when it is READY."""
    check = CHECK_BYTES if placement.main_device == "cpu" else 0
    return cpu.weights + cpu.runtime - JAVA_BYTES + placement.read_ahead_bytes + kept + check


def _serving(
    placement: Placement, cpu: Device, architecture: Architecture, capacity: Capacity, settings: Settings
) -> dict[int, int]:
    """Most bytes that it takes while it serves one sequence of full length, no prompts being kept, and while it serves
    as many as it may and the plan's keys and values are full."""
    full = cpu.needed - JAVA_BYTES
    if placement.main_device != "cpu" or settings.max_batch_size == 1:
        return {1: full, settings.max_batch_size: full}
    tokens = min(capacity.kv_cache_tokens, capacity.kv_cache_bytes // architecture.kv_bytes_per_token)
    is_replayed = settings.replay_steps and not placement.read_ahead_bytes
    step = replayed_step(1, tokens) if is_replayed else COLUMN_STEP
    row = with_spare_columns(capacity.max_sequence_length, step) * architecture.kv_bytes_per_token
    kv_cache = min(row, capacity.kv_cache_bytes)
    alone = Capacity.of(architecture, settings.model_copy(update={"max_batch_size": 1}))
    taken = kv_cache + kv_copy_bytes(architecture, kv_cache) + alone.activation_bytes
    others = cpu.kv_cache + cpu.kv_copies + capacity.activation_bytes - taken
    return {1: full - others, settings.max_batch_size: full}


def _multiplied(model: PreTrainedModel, placement: Placement) -> int:
    """Weights that each token is multiplied with: all matrices but a table that rows are looked up in. All experts are
    counted, whichever a token goes to."""
    tables = [f"{part.name}.weight" for part in placement.parts if part.looked_up]
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and name not in tables]
    return sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in matrices)  # two of int4 are in a byte


def _streamed(placement: Placement, stored: float) -> dict[str, int]:
    """Bytes that a step reads from disk, over PCIe and from the node's memory.

    stored: bytes on disk for each byte in memory, more than 1 when the dtype on disk is wider.
    """
    main = placement.main_device
    streamed = {"disk": 0, "pcie": 0, "ram": 0}
    for part in placement.parts:
        if part.device == "disk" and not part.looked_up:
            streamed["disk"] += int(part.bytes * stored)
        if placement.is_streamed(part) and main != "cpu":
            streamed["pcie"] += part.bytes
        if main == "cpu" and not part.looked_up:
            streamed["ram"] += part.bytes
    return streamed
