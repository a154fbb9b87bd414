"""`setup_config.json`, key by key: how the engine runs, how the model is loaded and how it answers."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from handler.errors import SettingsError

UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40,
}  # fmt: skip
SIZE_HELP = "a number of bytes, or a number and one of KB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB"


def parse_size(value: int | float | str) -> int:
    """Bytes of a size as people write it: `10GB`, `"512 MiB"`, `1.5GiB`, `1000000`.

    Raises ValueError for anything else, a lower-case unit included: Accelerate would read "10gb" as bits.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    if isinstance(value, bool) or not match or match[2] not in UNITS:
        raise ValueError(SIZE_HELP)
    return int(float(match[1]) * UNITS[match[2]])


def _device(key: Any) -> int | str:
    """GPU indices come as "0" from JSON and as 0 from Python."""
    if key in ("cpu", "disk", "mps"):
        return key
    if isinstance(key, int) or (isinstance(key, str) and key.isdecimal()):
        return int(key)
    raise ValueError('a GPU index such as "0", "cpu" or "disk"')


def _generation_defaults(values: Any) -> Any:
    """Held to what a request is held to, so that no default makes every request fail."""
    from transformers import GenerationConfig  # slow to import, and only needed when the key is used

    from handler.engine import InvalidRequest
    from handler.engine.sampling_params import checked

    if isinstance(values, dict):
        try:
            params = checked(values)
        except InvalidRequest as error:
            raise ValueError(f"GenerationConfig's parameters as a request may have them: {error}") from None
        GenerationConfig(**{k: v for k, v in params.items() if k != "seed"}).validate(strict=True)
    return values


Size = Annotated[int, BeforeValidator(parse_size), Field(ge=0)]
Device = Annotated[int | str, BeforeValidator(_device)]


class EngineConfig(BaseModel):
    """The engine's limits, and the generation parameters of requests that do not give them."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    max_new_tokens: PositiveInt = Field(
        80,
        validation_alias=AliasChoices("max_new_tokens", "max_length"),
        description="New tokens a request gets unless it says otherwise. `max_length` is the sample's name for it.",
    )
    generation: Annotated[dict[str, Any], BeforeValidator(_generation_defaults)] = Field(
        default_factory=dict, description="Defaults for a request, with transformers' GenerationConfig names."
    )
    max_prompt_tokens: PositiveInt | None = Field(None, description="Longer prompts are refused with 413.")
    max_batch_size: PositiveInt = Field(32, description="Most sequences that run at the same time.")
    max_sequence_length: PositiveInt | None = Field(
        None, description="Most tokens of prompt and continuation together; by default the model's own limit."
    )
    kv_cache_memory: Size | None = Field(
        None,
        description="Most bytes of keys and values; by default those of full rows, or what memory is left for.",
    )
    prefill_chunk: PositiveInt = Field(
        256, description="Most prompt tokens in one step, so that nobody stalls; four times that while nobody decodes."
    )
    num_speculative_tokens: NonNegativeInt = Field(
        16, description="Most tokens guessed ahead for a sequence in a step, where that pays; 0 for none."
    )
    prefix_cache: Literal["off", "salted", "shared"] = Field(
        "shared",
        description="Who shares keys and values of prompts that begin the same: nobody, who sends the same cache_salt, "
        "or also those who send none.",
    )
    max_queue: PositiveInt = Field(192, description="Most sequences that wait; more are refused with 429.")
    max_wait: PositiveFloat = Field(60, description="Seconds after which a request that still waits ends with 503.")


class Settings(EngineConfig):
    """setup_config.json: the engine's keys, and those of loading and answering. Every key of the sample is here."""

    revision: str | None = Field(None, description="Where the checkpoint came from; the files decide, not this.")
    max_memory: dict[Device, Size] | None = Field(
        None, description="Most bytes of weights a device may hold; what fits nowhere is read from disk."
    )
    low_cpu_mem_usage: bool = Field(True, description="Accepted for the sample's sake: always on.")
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | dict[str, Device] = Field(
        "auto", description="How Accelerate places layers, or a map from module name to device."
    )
    offload_folder: str = Field("offload", description="Where layers of .bin checkpoints go that live on disk.")
    offload_state_dict: bool = Field(True, description="Accepted for the sample's sake: always on.")
    offload_buffers: bool = Field(False, description="Offload the buffers of offloaded layers too.")
    dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] = Field(
        "auto",
        validation_alias=AliasChoices("dtype", "torch_dtype"),
        description='What the weights are computed in; "auto": as they are stored. `torch_dtype` is its old name.',
    )
    pack_weights: bool = Field(
        True,
        description="Hold what a CPU computes with in its kernels' order; 16 bits that it has no instructions for in "
        "float32, if all fit.",
    )
    compile_kernels: bool = Field(
        True, description="Decode on an x86 CPU with code that is compiled for it, in place of PyTorch's operators."
    )
    replay_steps: bool = Field(
        True, description="Replay steps of one token a sequence, and a CPU's short prompts, where one device holds all."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the checkpoint.")

    return_full_text: bool = Field(True, description="Answer with the prompt and its continuation, as the sample.")
    time_slice_ms: PositiveInt = Field(100, description="Milliseconds between two replies to TorchServe, at most.")

    @model_validator(mode="before")
    @classmethod
    def _one_name_each(cls, values: Any) -> Any:
        """A key under two names is only fine when both say the same or, for max_length, when it is the older."""
        if isinstance(values, dict):
            if {"dtype", "torch_dtype"} <= values.keys() and values["dtype"] != values["torch_dtype"]:
                raise ValueError(f"dtype is {values['dtype']!r} and torch_dtype {values['torch_dtype']!r}: keep one")
            values = dict(values)
            for new, old in (("dtype", "torch_dtype"), ("max_new_tokens", "max_length")):
                if new in values:
                    values.pop(old, None)
            if values.get("device_map") is True:  # the sample's text says to set it "to true"
                values["device_map"] = "auto"
        return values


def read_settings(path: Path) -> Settings:
    """The settings in a JSON file; all defaults when there is no such file.

    Raises SettingsError, in one line, for JSON that does not parse, an unknown key or a bad value.
    """
    if not path.is_file():
        return Settings()
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise SettingsError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path.name} must hold one JSON object, not {type(values).__name__}")
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError(f"{path.name}: {_one_line(error, values)}") from None


def _one_line(error: ValidationError, values: dict) -> str:
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        names = sorted({*Settings.model_fields, "torch_dtype", "max_length"})
        return f"unknown key {location[0]!r} (value {problem['input']!r}); the keys are {', '.join(names)}"
    if not location:
        return problem["msg"].removeprefix("Value error, ")
    allowed = problem["msg"].removeprefix("Value error, ")
    key, value = location[0], values.get(location[0], problem["input"])
    if key == "device_map":
        devices = 'a map from module name to a GPU index, "cpu" or "disk"'
        return f"device_map is {value!r}; allowed: auto, balanced, balanced_low_0, sequential, or {devices}"
    where = ".".join(location[:2] if key == "max_memory" else location[:1])
    return f"{where} is {problem['input']!r}; allowed: {allowed}"
