"""Generation parameters under transformers' `GenerationConfig` names: checked, completed, merged."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import GenerationConfig

from .errors import InvalidRequest
from .job import Request

_SHARES = ("top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_SAMPLING = ("temperature", "top_k", *_SHARES)
_PENALTIES = ("repetition_penalty", "encoder_repetition_penalty")
_NUMBERS = ("temperature", *_SHARES, *_PENALTIES, "max_time")
_FORCED = ("forced_bos_token_id", "forced_eos_token_id")
_IDS = {"bad_words_ids", "suppress_tokens", "begin_suppress_tokens", *_FORCED}
_SEEDS = range(2**62 + 1)  # seed + n must stay within 64 bits
# Types are checked here because the library's own errors for a wrong type do not name the parameter.
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("max_new_tokens", "max_length", "min_new_tokens", "min_length"), (int,)),
    **dict.fromkeys(("top_k", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (int,)),
    **dict.fromkeys(("num_return_sequences", "seed"), (int,)),
    **dict.fromkeys(("forced_bos_token_id", "pad_token_id", "bos_token_id"), (int,)),
    **dict.fromkeys(("eos_token_id", "forced_eos_token_id"), (int, list, tuple)),
    **dict.fromkeys(_NUMBERS, (int, float)),
    **dict.fromkeys(("do_sample", "renormalize_logits", "remove_invalid_values"), (bool,)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens"), (list, tuple)),
    "exponential_decay_length_penalty": (list, tuple),
    "sequence_bias": (list, tuple, dict),
    "stop_strings": (str, list, tuple),
}
_POSITIVE = ("max_new_tokens", "max_length", "num_return_sequences", "max_time", *_PENALTIES)
_LIBRARY = GenerationConfig()
_NEUTRAL = GenerationConfig._get_default_generation_params()


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with their types checked and `do_sample` spelled out. None means "not given".

    A sampling parameter without `do_sample` asks for sampling; temperature 0 asks for greedy decoding.
    Raises InvalidRequest naming the parameter.
    """
    said = {k: v for k, v in given.items() if v is not None and not _is_neutral(k, v)}
    parameters = {name: _typed(name, value) for name, value in said.items()}
    if parameters.get("temperature") == 0:
        parameters = {k: v for k, v in parameters.items() if k not in _SAMPLING} | {"do_sample": False}
    elif any(name in parameters for name in _SAMPLING):
        parameters.setdefault("do_sample", True)
    return parameters


def merged(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Both `checked`; `given` wins, also where two names mean the same limit."""
    rivals = {"max_new_tokens": "max_length", "min_new_tokens": "min_length"}
    rivals |= {new: old for old, new in rivals.items()}
    both = {k: v for k, v in defaults.items() if rivals.get(k) not in given} | dict(given)
    unused = () if both.get("do_sample") else _SAMPLING  # the library warns of them at every request
    return {k: v for k, v in both.items() if k not in unused}


def stop_strings(*sources: str | Iterable[str] | None) -> tuple[str, ...]:
    """All stop strings of a request. Raises InvalidRequest for one that is empty or no string."""
    lists = [[source] if isinstance(source, str) else list(source or ()) for source in sources]
    strings = tuple(dict.fromkeys(s for group in lists for s in group))
    if not all(isinstance(s, str) and s for s in strings):
        raise InvalidRequest("stop, stop_strings: send one string or a list of strings that are not empty")
    return strings


def check_request(request: Request, vocab_size: int) -> None:
    """Check what a request says beside its parameters and prompt. Raises InvalidRequest naming the field."""
    _expect("n", request.n, "an integer of at least 1", type(request.n) is int and request.n >= 1)
    seed = request.seed
    _expect("seed", seed, "0 to 2**62", seed is None or (type(seed) is int and seed in _SEEDS))
    top = request.logprobs
    fits = top is None or (type(top) is int and 0 <= top <= vocab_size)
    _expect("logprobs", top, f"an integer from 0 to {vocab_size}", fits)
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(request, name)
        _expect(name, value, "a number", isinstance(value, int | float) and math.isfinite(value))
    bias = request.logit_bias or {}
    fits = all(type(i) is int and 0 <= i < vocab_size and isinstance(b, int | float) for i, b in bias.items())
    _expect("logit_bias", bias, f"numbers for token ids below {vocab_size}", fits)


def check_ids(parameters: Mapping[str, Any], vocab_size: int) -> None:
    """Check token ids here: some processors do so late, and on a GPU a bad index ends the process."""
    for name in _IDS & parameters.keys():
        value = parameters[name]
        flat = [i for item in _as_list(value) for i in _as_list(item)]
        fits = all(type(i) is int and 0 <= i < vocab_size for i in flat)
        _expect(name, value, f"token ids below {vocab_size}", fits)


def _as_list(value: Any) -> list[Any] | tuple[Any, ...]:
    return value if isinstance(value, list | tuple) else [value]


def _expect(name: str, value: Any, wanted: str, holds: bool) -> None:
    if not holds:
        raise InvalidRequest(f"{name}: expected {wanted}, got {value!r}")


def _is_neutral(name: str, value: Any) -> bool:
    """A library parameter that we do not support, at the value which changes nothing."""
    return name not in _TYPES and hasattr(_LIBRARY, name) and name in _NEUTRAL and value == _NEUTRAL[name]


def _typed(name: str, value: Any) -> Any:
    if name not in _TYPES:
        why = "cannot be honoured here" if hasattr(_LIBRARY, name) else "is no generation parameter"
        raise InvalidRequest(f"{name}: {value!r} {why}; leave it out. Known are {', '.join(sorted(_TYPES))}")
    types = _TYPES[name]
    fits = isinstance(value, types) and not (isinstance(value, bool) and bool not in types)
    _expect(name, value, " or ".join(t.__name__ for t in types), fits)
    _expect(name, value, "more than 0", name not in _POSITIVE or value > 0)
    _expect(name, value, "0 or more", name != "temperature" or value >= 0)
    _expect(name, value, "0 to 1", name not in _SHARES or 0 <= value <= 1)  # more is ignored there
    _expect(name, value, "0 to 2**62", name != "seed" or value in _SEEDS)
    return float(value) if name in _NUMBERS else value
