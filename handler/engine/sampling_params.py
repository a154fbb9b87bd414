"""A request's generation parameters: checked, completed from the defaults, and resolved once into SamplingParams.

Names are those of transformers' `GenerationConfig`, and `seed`.
"""

import itertools
import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from .errors import InvalidRequest, PromptTooLong
from .grammar_compiler import check_grammar
from .request import Grammar, Request

_FRACTIONS = ("top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_SAMPLING = ("temperature", "top_k", *_FRACTIONS)
_PENALTIES = ("repetition_penalty", "encoder_repetition_penalty")
_NUMBERS = ("temperature", *_FRACTIONS, *_PENALTIES, "max_time")
_TOKEN_ID_LISTS = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens")
_TOKEN_IDS = {*_TOKEN_ID_LISTS, "forced_bos_token_id", "forced_eos_token_id"}
_NGRAM_SIZES = ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size")
_LARGEST_NGRAM = 256  # tokens: larger ones would take long to look for at each step
_SEEDS = range(-(2**63), 2**63)  # as OpenAI's; torch takes these, and seed + n too
# What a request may bring at most, so that neither its beginning nor a step of it is long.
MOST_TOKEN_IDS = 4096  # in one parameter
_MOST_STOP_STRINGS, _LONGEST_STOP_STRING = 64, 256
_LONGEST_SALT = 256
# Types are checked here because the library's own errors for a wrong type do not name the parameter.
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("max_new_tokens", "max_length", "min_new_tokens", "min_length"), (int,)),
    **dict.fromkeys(("top_k", *_NGRAM_SIZES), (int,)),
    **dict.fromkeys(("num_return_sequences", "seed", "forced_bos_token_id", "pad_token_id", "bos_token_id"), (int,)),
    **dict.fromkeys(("eos_token_id", "forced_eos_token_id"), (int, list, tuple)),
    **dict.fromkeys(_NUMBERS, (int, float)),
    **dict.fromkeys(("do_sample", "renormalize_logits", "remove_invalid_values"), (bool,)),
    **dict.fromkeys((*_TOKEN_ID_LISTS, "exponential_decay_length_penalty"), (list, tuple)),
    "sequence_bias": (list, tuple, dict),
    "stop_strings": (str, list, tuple),
}
_POSITIVE = ("max_new_tokens", "max_length", "num_return_sequences", "max_time", *_PENALTIES)
_NOT_NEGATIVE = ("temperature", "min_new_tokens", "min_length", *_NGRAM_SIZES)
_DIVISORS = ("temperature", *_PENALTIES)
# Those that have a field of their own in SamplingParams, and that no logits processor needs.
_RESOLVED = {"max_length", "num_return_sequences", "seed", "stop_strings", "max_time"}
_LIBRARY = GenerationConfig()
_LIBRARY_DEFAULTS = GenerationConfig._get_default_generation_params()


@dataclass(frozen=True)
class SamplingParams:
    """What a request comes to once defaults, aliases and limits are applied. Nothing reads the request's own fields
    after this.

    n: continuations; the i-th draws with seed + i.
    max_new_tokens: most tokens of each continuation.
    stop: strings that end a continuation, but none that is complete within its first min_new_tokens tokens.
    eos_token_ids: tokens that end it besides the model's own.
    max_time: seconds from the submission on, or None.
    logprobs: most likely tokens to report beside each chosen one, or None for no log-probabilities at all.
    generation: the parameters that transformers turns into logits processors and eos tokens.
    """

    n: int
    max_new_tokens: int
    min_new_tokens: int
    seed: int | None
    stop: tuple[str, ...]
    eos_token_ids: tuple[int, ...]
    max_time: float | None
    ignore_eos: bool
    grammar: Grammar | None
    logprobs: int | None
    prompt_logprobs: bool
    logit_bias: Mapping[int, float]
    presence_penalty: float
    frequency_penalty: float
    generation: Mapping[str, Any]

    @property
    def do_sample(self) -> bool:
        return bool(self.generation.get("do_sample"))


def resolve(
    request: Request, prompt_length: int, defaults: Mapping[str, Any], vocab_size: int, max_length: int
) -> SamplingParams:
    """The parameters of a request whose prompt has `prompt_length` tokens, fewer than `max_length`.

    defaults: `checked` parameters for what the request does not specify.
    max_length: most tokens of prompt and continuation together.
    Raises InvalidRequest naming the field, and PromptTooLong with the tokens asked for and allowed.
    """
    specified = checked(request.parameters)
    _check_fields(request, vocab_size)
    params = _merged(defaults, specified)
    _check_token_ids(params, specified, vocab_size)
    is_explicit = "max_new_tokens" in specified or "max_length" in specified
    max_new_tokens = _max_new_tokens(params, prompt_length, max_length, is_explicit)
    for name, least in (("min_new_tokens", 0), ("min_length", prompt_length)):
        most = least + max_new_tokens
        _require(name, specified.get(name), f"at most the {most} tokens there may be", specified.get(name, 0) <= most)
    unused = _RESOLVED | ({"min_new_tokens", "min_length"} if request.ignore_eos else set())
    generation = {name: value for name, value in params.items() if name not in unused}
    return SamplingParams(
        n=request.n if request.n > 1 else params.get("num_return_sequences", 1),
        max_new_tokens=max_new_tokens,
        min_new_tokens=params.get("min_new_tokens", 0),
        seed=request.seed if request.seed is not None else params.get("seed"),
        stop=(*_stop_strings("stop", request.stop), *_stop_strings("stop_strings", params.get("stop_strings"))),
        eos_token_ids=request.eos_token_ids,
        max_time=params.get("max_time"),
        ignore_eos=request.ignore_eos,
        grammar=request.grammar,
        logprobs=request.logprobs,
        prompt_logprobs=request.prompt_logprobs,
        logit_bias=dict(request.logit_bias or {}),
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        generation=generation | {"max_new_tokens": max_new_tokens},
    )


def checked(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with their types checked and `do_sample` spelled out. None means "not specified".

    A sampling parameter without `do_sample` asks for sampling; temperature 0 asks for greedy decoding.
    Raises InvalidRequest naming the parameter.
    """
    specified = {k: v for k, v in parameters.items() if v is not None and not _is_neutral(k, v)}
    params = {name: _checked_value(name, value) for name, value in specified.items()}
    if params.get("temperature") == 0:
        params = {k: v for k, v in params.items() if k not in _SAMPLING} | {"do_sample": False}
    elif any(name in params for name in _SAMPLING):
        params.setdefault("do_sample", True)
    return params


def _merged(defaults: Mapping[str, Any], specified: Mapping[str, Any]) -> dict[str, Any]:
    """Both `checked`; what is specified wins, also where two names mean the same limit."""
    aliases = {"max_new_tokens": "max_length", "min_new_tokens": "min_length"}
    aliases |= {new: old for old, new in aliases.items()}
    params = {k: v for k, v in defaults.items() if aliases.get(k) not in specified} | dict(specified)
    unused = () if params.get("do_sample") else _SAMPLING  # the library warns of them at every request
    return {k: v for k, v in params.items() if k not in unused}


def _max_new_tokens(params: Mapping[str, Any], prompt_length: int, longest: int, is_explicit: bool) -> int:
    """New tokens of each continuation. A default gives way to what fits; what the request specifies does not."""
    new = params["max_new_tokens"] if "max_new_tokens" in params else params["max_length"] - prompt_length
    if new <= 0:
        raise PromptTooLong(f"the prompt has {prompt_length} tokens, max_length is {prompt_length + new}; raise it")
    if is_explicit and prompt_length + new > longest:
        raise PromptTooLong(
            f"prompt and max_new_tokens are {prompt_length} + {new} = {prompt_length + new} tokens, at most {longest} "
            f"fit; send a shorter prompt or max_new_tokens of at most {longest - prompt_length}"
        )
    return min(new, longest - prompt_length)


def _stop_strings(name: str, value: str | Iterable[str] | None) -> list[str]:
    strings = [value] if isinstance(value, str) else list(value or ())
    if not all(isinstance(s, str) and 0 < len(s) <= _LONGEST_STOP_STRING for s in strings):
        raise InvalidRequest(
            f"{name}: send one string or a list of strings, each of 1 to {_LONGEST_STOP_STRING} characters"
        )
    _require(name, strings, f"at most {_MOST_STOP_STRINGS} strings", len(strings) <= _MOST_STOP_STRINGS)
    return strings


def _check_fields(request: Request, vocab_size: int) -> None:
    """Check what a request says beside its parameters and prompt."""
    _require("n", request.n, "an integer of at least 1", type(request.n) is int and request.n >= 1)
    seed = request.seed
    _require("seed", seed, "an integer of 64 bits", seed is None or (type(seed) is int and seed in _SEEDS))
    top = request.logprobs
    is_valid = top is None or (type(top) is int and 0 <= top <= vocab_size)
    _require("logprobs", top, f"an integer from 0 to {vocab_size}", is_valid)
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(request, name)
        _require(name, value, "a number", isinstance(value, int | float) and math.isfinite(value))
    bias = request.logit_bias or {}
    _require("logit_bias", bias, f"at most {MOST_TOKEN_IDS} token ids", len(bias) <= MOST_TOKEN_IDS)
    is_valid = all(type(i) is int and 0 <= i < vocab_size and isinstance(b, int | float) for i, b in bias.items())
    _require("logit_bias", bias, f"numbers for token ids below {vocab_size}", is_valid)
    salt = request.cache_salt
    is_valid = salt is None or (isinstance(salt, str) and 0 < len(salt) <= _LONGEST_SALT)
    _require("cache_salt", salt, f"1 to {_LONGEST_SALT} characters", is_valid)
    if request.grammar:
        check_grammar(request.grammar)
        _require(
            "ignore_eos",
            request.ignore_eos,
            f"false, as {request.grammar.field} says where to end",
            not request.ignore_eos,
        )


def _check_token_ids(params: Mapping[str, Any], specified: Mapping[str, Any], vocab_size: int) -> None:
    """Check token ids here: some processors do so late, and on a GPU a bad index ends the process. Only the request's
    own, `specified`, are counted: the defaults are the server's."""
    for name in {*_TOKEN_IDS, "eos_token_id", "sequence_bias"} & specified.keys():
        items = itertools.islice(_items(specified[name]), MOST_TOKEN_IDS + 1)
        _require(name, specified[name], f"at most {MOST_TOKEN_IDS} numbers", len(list(items)) <= MOST_TOKEN_IDS)
    for name in _TOKEN_IDS & params.keys():
        value = params[name]
        flat = [i for item in _as_list(value) for i in _as_list(item)]
        is_valid = all(type(i) is int and 0 <= i < vocab_size for i in flat)
        _require(name, value, f"token ids below {vocab_size}", is_valid)
    # -1 is the library's way to say that nothing ends a continuation.
    eos = _as_list(specified.get("eos_token_id", []))
    is_valid = all(type(i) is int and -1 <= i < vocab_size for i in eos)
    _require("eos_token_id", eos, f"token ids below {vocab_size}, or -1", is_valid)


def _items(value: Any) -> Iterator[Any]:
    """The items of nested lists; an empty one counts too."""
    if isinstance(value, list | tuple | dict) and value:
        for item in value:
            yield from _items(item)
    else:
        yield value


def _as_list(value: Any) -> list[Any] | tuple[Any, ...]:
    return value if isinstance(value, list | tuple) else [value]


def _require(name: str, value: Any, expected: str, is_valid: bool) -> None:
    if not is_valid:
        raise InvalidRequest(f"{name}: expected {expected}, got {reprlib.repr(value)}")


def _is_neutral(name: str, value: Any) -> bool:
    """A library parameter that we do not support, at the value which changes nothing."""
    return name not in _TYPES and name in _LIBRARY_DEFAULTS and value == _LIBRARY_DEFAULTS[name]


def _checked_value(name: str, value: Any) -> Any:
    if name not in _TYPES:
        why = "cannot be honoured here" if hasattr(_LIBRARY, name) else "is no generation parameter"
        raise InvalidRequest(
            f"{name}: {reprlib.repr(value)} {why}; leave it out. Known are {', '.join(sorted(_TYPES))}"
        )
    types = _TYPES[name]
    is_valid = isinstance(value, types) and not (isinstance(value, bool) and bool not in types)
    _require(name, value, " or ".join(t.__name__ for t in types), is_valid)
    _require(name, value, "more than 0", name not in _POSITIVE or value > 0)
    _require(name, value, "a number below 2**63", not isinstance(value, int | float) or -(2**63) <= value < 2**63)
    _require(name, value, "0 or more", name not in _NOT_NEGATIVE or value >= 0)
    _require(name, value, f"at most {_LARGEST_NGRAM}", name not in _NGRAM_SIZES or value <= _LARGEST_NGRAM)
    # Scores are divided by these in float32: smaller ones would make them infinite.
    _require(name, value, "1e-6 or more", name not in _DIVISORS or value >= 1e-6 or value == 0)
    # The library takes a fraction above 1 and ignores it.
    _require(name, value, "0 to 1", name not in _FRACTIONS or 0 <= value <= 1)
    _require(name, value, "an integer of 64 bits", name != "seed" or value in _SEEDS)
    _require(name, value, "[start, factor]", name != "exponential_decay_length_penalty" or _is_decay(value))
    return float(value) if name in _NUMBERS else value


def _is_decay(value: Any) -> bool:
    start, factor = value if len(value) == 2 else (None, None)
    return type(start) is int and isinstance(factor, int | float) and 0 < factor < 2**63
