"""A checkpoint folder -> a model across GPUs, CPU and disk, with Accelerate."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import get_state_dict_dtype, load_state_dict
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from handler.engine.block_attention import use_block_attention
from handler.engine.bloom import mend_bloom
from handler.engine.draft_model import DraftModel
from handler.engine.norms import mend_norms
from handler.engine.replay import use_replay
from handler.engine.rotation import mend_rotation
from handler.errors import LoadError, first_line
from handler.kernels.cpu import use_machine_code
from handler.memory import device_limits, free_memory, limits_beside_draft
from handler.settings import Settings
from handler.weights.cpu_linear import cpu_lacks, widens
from handler.weights.files import weight_files
from handler.weights.onloading import onload_weights
from handler.weights.packed import can_pack_all, own_resident_weights, pack_weights, products_of
from handler.weights.placement import Placement, device_map, max_memory, weight_bytes
from handler.weights.quantized import quantize_modules
from handler.weights.streaming import StreamedWeights, stream_weights

logger = logging.getLogger(__name__)

# The oldest driver for a major version of CUDA, https://docs.nvidia.com/deploy/cuda-compatibility/
_DRIVERS = {"12": "525 or newer", "13": "580 or newer"}


@dataclass(frozen=True)
class LoadedModel:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device_map: dict[str, int | str]
    placement: Placement
    streamed: StreamedWeights | None  # what the disk tier is read through
    products: str  # what matrices are multiplied in, and how
    draft: PreTrainedModel | None = None  # a small one with the same tokens, on the main device


def load_model(folder: Path, settings: Settings, work_folder: Path, draft_folder: Path | None = None) -> LoadedModel:
    """Load the causal language model in `folder` on the tiers that `settings` allows.

    Peak memory while loading is what stays resident plus about the largest shard. `work_folder` is where a
    relative `offload_folder` lies; safetensors are read in place and leave it empty. The draft model in `draft_folder`
    is loaded where steps bring weights to the device that computes.

    Raises CheckpointError for a folder without weights, and LoadError for one without a tokenizer or a causal
    language model, where there are fewer GPUs than the environment's REQUIRE_GPUS says, and for a draft model with
    another tokenizer.
    """
    use_machine_code(settings.compile_kernels)
    use_replay(settings.replay_steps)
    files = weight_files(folder)
    config = read_config(folder, settings)
    tokenizer = _load_tokenizer(folder, settings)
    gpus = torch.cuda.device_count()
    _require_gpus(gpus)
    settings, empty, limits = _computed_as(config, settings, files, gpus)
    empty_draft = None
    if draft_folder and settings.num_speculative_tokens:
        _require_same_tokens(tokenizer, _load_tokenizer(draft_folder, settings))
        empty_draft = meta_model(read_config(draft_folder, settings), settings, weight_files(draft_folder))
        beside = limits_beside_draft(empty, settings, free_memory(gpus), empty_draft)
        if beside is None:
            empty_draft = None
            logger.info("the draft model is not loaded: no step reads weights")
        else:
            limits = beside
    model = _from_pretrained(
        folder,
        settings,
        device_map=device_map(settings, gpus, empty, limits),
        max_memory=limits,
        offload_folder=work_folder / settings.offload_folder,
        offload_buffers=settings.offload_buffers,
    )
    # A model that went to one device whole has no map of its own.
    placed = getattr(model, "hf_device_map", {"": "cpu" if model.device.type == "cpu" else model.device.index})
    placement = Placement.of(model, placed)
    draft = None
    if draft_folder and empty_draft:
        placement = placement.with_draft(empty_draft, DraftModel.cache_bytes(empty_draft))
        draft = _load_draft(draft_folder, settings, placement.main_device)
    for device, tier in placement.tiers.items():
        logger.info("%s holds %d layers, %.2f GB", device, tier.layers, tier.bytes / 1e9)
    packed = pack_weights(model) if settings.pack_weights else 0
    own_resident_weights(model)
    products = products_of(model, placement.main_device, packed)
    logger.info("products: %s", products)
    streamed = stream_weights(model, placement.read_ahead_bytes)
    if streamed is not None:
        logger.info("what is on disk is read with %s, %.2f GB/s", streamed.reader.method, streamed.rate / 1e9)
    if placement.main_device != "cpu":
        onload_weights(model, placement.ring_bytes)
    return LoadedModel(model, tokenizer, placed, placement, streamed, products, draft)


def _from_pretrained(folder: Path, settings: Settings, **places: Any) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
        weights_only=True,
        local_files_only=True,
        **places,
    )
    model.eval()
    mend(model)
    return model


def mend(model: PreTrainedModel) -> None:
    """Put code of ours in the place of the library's, where it does the same."""
    mend_bloom(model)
    mend_norms(model)
    mend_rotation(model)
    use_block_attention()


def _load_draft(folder: Path, settings: Settings, device: str) -> PreTrainedModel:
    """All of it on one device, "gpu 0" or "cpu"."""
    draft = _from_pretrained(folder, settings, device_map={"": device.replace("gpu ", "cuda:")})
    if settings.pack_weights:
        pack_weights(draft)
    own_resident_weights(draft)
    return draft


def _require_same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> None:
    same = {
        "vocabulary": one.get_vocab() == other.get_vocab(),
        "special tokens": one.special_tokens_map == other.special_tokens_map,
    }
    if differing := [name for name, is_same in same.items() if not is_same]:
        raise LoadError(
            f"draft_model/ has another tokenizer than the model ({' and '.join(differing)} differ): take a model of "
            "the same family, or none"
        )


def _computed_as(
    config: PreTrainedConfig, settings: Settings, files: Sequence[Path], gpus: int
) -> tuple[Settings, PreTrainedModel, dict[int | str, int]]:
    """The settings, the model without weights, and the bytes that each device may hold: in float32 where this CPU
    computes, has neither instructions for the dtype nor code of ours for all matrices, and can hold all of it so."""

    def planned(settings: Settings) -> tuple[Settings, PreTrainedModel, dict[int | str, int]]:
        empty = meta_model(config, settings, files)
        return settings, empty, max_memory(settings, gpus) or device_limits(empty, settings, free_memory(gpus))

    plan = _, empty, _ = planned(settings)
    if gpus or not settings.pack_weights or not cpu_lacks(empty.dtype) or getattr(config, "quantization_config", None):
        return plan
    if widens(empty.dtype) and can_pack_all(empty):
        return plan
    wider, wide, limits = float32 = planned(settings.model_copy(update={"dtype": "float32"}))
    named = settings.device_map.values() if isinstance(settings.device_map, dict) else ()
    # max_memory may allow more than a pod has that was planned with the stored dtype.
    room = min(limits.get("cpu", 0), device_limits(wide, wider, free_memory(gpus))["cpu"])
    fits = "disk" not in named and weight_bytes(wide) <= room
    return float32 if fits else plan


def _require_gpus(found: int) -> None:
    """A pod that asked for GPUs must not serve on its CPUs in silence, a hundred times slower."""
    wanted = os.environ.get("REQUIRE_GPUS") or "0"
    if not wanted.isdecimal():
        raise LoadError(f"REQUIRE_GPUS is {wanted!r}: give a number of GPUs")
    if found >= int(wanted):
        return
    if torch.version.cuda is None:
        reason = "this PyTorch is built for CPUs: build the image without TORCH_INDEX_URL"
    else:
        driver = _DRIVERS.get(torch.version.cuda.partition(".")[0], "a newer one")
        reason = (
            f"this PyTorch is built for CUDA {torch.version.cuda}, for which the node needs NVIDIA driver {driver} "
            "(nvidia-smi says which it has) or the image an older CUDA (build argument TORCH_INDEX_URL)"
        )
    raise LoadError(f"REQUIRE_GPUS is {wanted} and PyTorch sees {found}: {reason}")


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


def meta_model(config: PreTrainedConfig, settings: Settings, files: Sequence[Path]) -> PreTrainedModel:
    """The model without weights, in the dtype that it is loaded in. files: of its weights, where there are any."""
    dtype = getattr(torch, settings.dtype) if settings.dtype != "auto" else config.dtype or _stored_dtype(files)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=settings.trust_remote_code)
        quantize_modules(model)
    model.tie_weights(recompute_mapping=False)
    return model.eval()


def _stored_dtype(files: Sequence[Path]) -> torch.dtype:
    """What from_pretrained takes when the config names no dtype: the first file's. Only its header is read."""
    return get_state_dict_dtype(load_state_dict(files[0], map_location="meta")) if files else torch.float32


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
