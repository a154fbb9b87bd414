"""A checkpoint folder -> a model across GPUs, CPU and disk, with Accelerate. GPU code is Accelerate's alone."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.bloom.modeling_bloom import BloomGelu

from handler.checkpoint import weight_files
from handler.errors import LoadError, first_line
from handler.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tier:
    """What one device holds: the number of decoder layers wholly or partly there, and the bytes of weights."""

    layers: int
    bytes: int


@dataclass(frozen=True)
class LoadedModel:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device_map: dict[str, int | str]
    tiers: dict[str, Tier]


def load_model(folder: Path, settings: Settings, work_folder: Path) -> LoadedModel:
    """Load the causal language model in `folder` on the tiers that `settings` allows.

    Peak memory while loading is what stays resident plus about the largest shard. `work_folder` is where a
    relative `offload_folder` lies; safetensors are read in place and leave it empty.

    Raises CheckpointError for a folder without weights, and LoadError for one without a tokenizer or a causal
    language model.
    """
    _check_folder(folder, settings)
    tokenizer = _load_tokenizer(folder, settings)
    gpus = torch.cuda.device_count()
    offload_folder = work_folder / settings.offload_folder
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=settings.dtype,
        device_map=device_map(settings, gpus),
        max_memory=max_memory(settings, gpus),
        offload_folder=offload_folder,
        offload_buffers=settings.offload_buffers,
        trust_remote_code=settings.trust_remote_code,
        weights_only=True,
        local_files_only=True,
    )
    model.eval()
    _fuse_gelu(model)
    # A model that went to one device whole has no map of its own.
    placed = getattr(model, "hf_device_map", {"": model.device.type})
    tiers = _tiers(model, placed)
    for device, tier in tiers.items():
        logger.info("%s holds %d layers, %.2f GB", device, tier.layers, tier.bytes / 1e9)
    return LoadedModel(model, tokenizer, placed, tiers)


def _fuse_gelu(model: PreTrainedModel) -> None:
    """Let PyTorch's GELU do what BLOOM's does in eight passes over the activations, rounding after each: the same
    formula, 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (Hendrycks and Gimpel, arXiv:1606.08415)."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, BloomGelu):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


def _check_folder(folder: Path, settings: Settings) -> None:
    weight_files(folder)
    read_config(folder, settings)


def read_config(folder: Path, settings: Settings) -> PreTrainedConfig:
    """config.json of a causal language model. Raises LoadError for anything else."""
    if not (folder / "config.json").is_file():
        raise LoadError(f"{folder} holds no config.json: give the folder of a Hugging Face checkpoint")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    except (ValueError, OSError) as error:
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            reason = "it needs Python code that comes with the checkpoint: set trust_remote_code if you trust it"
        raise LoadError(f"{folder / 'config.json'} cannot be used: {reason}") from error
    if config.is_encoder_decoder:
        raise LoadError(f"{config.model_type} is an encoder-decoder model: only causal language models are served")
    remote = settings.trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        raise LoadError(f"{config.model_type} has no causal language model in transformers: serve another checkpoint")
    return config


def _load_tokenizer(folder: Path, settings: Settings) -> PreTrainedTokenizerBase:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise LoadError(f"{folder} holds no tokenizer (tokenizer.json): download the checkpoint's tokenizer files too")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=settings.trust_remote_code, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise LoadError(f"the tokenizer in {folder} cannot be loaded: {first_line(error)}") from error
    return tokenizer


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


def _tiers(model: PreTrainedModel, placed: dict[str, int | str]) -> dict[str, Tier]:
    size: dict[str, int] = defaultdict(int)
    layers: dict[str, set[str]] = defaultdict(set)
    for name, device, count in placement(model, placed):
        size[device] += count
        if layer := decoder_layer(name):
            layers[device].add(layer)
    return {device: Tier(len(layers[device]), size[device]) for device in size}
