"""The next token of each row, with transformers' own logits processors.

Processors that look at a row's tokens run row by row. Those that look at scores only ("warpers") run at once
for all rows with the same settings, and on the few candidates that can win: the vocabulary may be large.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from transformers import EosTokenCriteria, GenerationConfig, LogitsProcessor
from transformers.generation import logits_process as library

from .capacity import DRAWN_LOGITS
from .errors import EngineError, InvalidRequest, ModelError
from .grammar import Compilation, GrammarState, apply_grammars
from .logits_processors import OpenAIPenalties, quick_equivalent
from .sampling_params import SamplingParams

TokenLogprob = tuple[int, float, list[tuple[int, float]]]  # token, its log-probability, the most likely ones

_WARPERS = (
    library.TemperatureLogitsWarper,
    library.TopHLogitsWarper,
    library.TopKLogitsWarper,
    library.TopPLogitsWarper,
    library.MinPLogitsWarper,
    library.TypicalLogitsWarper,
    library.EpsilonLogitsWarper,
    library.EtaLogitsWarper,
    library.InfNanRemoveLogitsProcessor,
    library.LogitNormalization,
)
_BLOCK = 1024  # scores of which the largest is found at once
_NUCLEUS = 1024  # candidates in which top_p looks first; a flatter row's whole vocabulary is sorted
_TIES = 64  # candidates beyond top_k: the library keeps what ties with the k-th, in bfloat16 often many


@dataclass
class Sampler:
    """How one sequence chooses its tokens.

    processors: run on [1, vocab] float32 scores with the row's tokens.
    warpers: run on scores alone.
    generator: the sequence's own randomness, or None when decoding is greedy.
    grammar: what the continuation must be, or None.
    """

    processors: list[LogitsProcessor] = field(default_factory=list)
    warpers: list[Any] = field(default_factory=list)
    generator: torch.Generator | None = None
    grammar: GrammarState | None = None

    @property
    def needs_tokens(self) -> bool:
        """Whether it looks at what was generated before."""
        return bool(self.processors or self.grammar)

    @cached_property
    def group(self) -> str:
        """Equal for samplers whose rows can be drawn together."""
        return str([self.generator is None, [(type(w).__name__, vars(w)) for w in self.warpers]])


def make_samplers(
    model: Any,
    prompt_ids: list[int],
    params: SamplingParams,
    device: torch.device,
    vocab_size: int,
    compilation: Compilation | None,
) -> tuple[list[Sampler], frozenset[int]]:
    """A sampler for each of the `n` continuations of a prompt, and the tokens that end one.

    model: its generation config names the special tokens. device: where the logits will be. compilation: of the
    request's grammar.
    Raises InvalidRequest for values that the library refuses.
    """
    generation = dict(params.generation)
    if params.eos_token_ids:
        own = generation.get("eos_token_id", model.generation_config.eos_token_id)
        own = own if isinstance(own, list | tuple) else [own] if own is not None else []
        generation["eos_token_id"] = [*own, *params.eos_token_ids]
    processors, eos_token_ids = _library_processors(model, prompt_ids, generation, device, vocab_size)
    if params.logit_bias or params.presence_penalty or params.frequency_penalty:
        processors = [OpenAIPenalties(params, len(prompt_ids)), *processors]
    generators = [_generator(params.seed, index, device) if params.do_sample else None for index in range(params.n)]
    samplers = [Sampler(*_split(processors), generator) for generator in generators]
    if compilation:
        for sampler in samplers:
            sampler.grammar = GrammarState(compilation, len(prompt_ids), eos_token_ids)
    return samplers, frozenset() if params.ignore_eos else eos_token_ids


def _generator(seed: int | None, index: int, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed + index)
    return generator


def _library_processors(
    model: Any, prompt_ids: list[int], generation: Mapping[str, Any], device: torch.device, vocab_size: int
) -> tuple[list[LogitsProcessor], frozenset[int]]:
    """The processors that `model.generate` would run for these parameters, and the tokens that would end it."""

    def capture(model, input_ids, logits_processor, stopping_criteria, **_):
        criteria = [c for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
        processors = [quick_equivalent(processor, ids[0], vocab_size) for processor in logits_processor]
        return processors, frozenset(t for c in criteria for t in c.eos_token_id.tolist())

    ids = torch.tensor([prompt_ids], device=device)
    try:
        # All ones: without a mask, generate takes pad tokens in the prompt for padding.
        mask = torch.ones_like(ids)
        config = GenerationConfig(**{**generation, "use_cache": False})  # it would make one, for nothing
        processors, eos = model.generate(ids, attention_mask=mask, generation_config=config, custom_generate=capture)
        for processor in _split(processors)[0]:  # some check their settings only when they are used
            scores = processor(ids, torch.zeros(1, vocab_size, device=device))
            if scores.isnan().any() or scores.isposinf().any():
                raise ValueError(f"{type(processor).__name__} makes scores that are not numbers")
        return processors, eos
    except (ValueError, TypeError, IndexError, RuntimeError, ArithmeticError) as error:
        raise InvalidRequest(f"parameters {', '.join(generation)}: {error}") from error


def _split(processors: list[LogitsProcessor]) -> tuple[list[LogitsProcessor], list[LogitsProcessor]]:
    """Those up to the last that looks at tokens, and the warpers after it."""
    needs_tokens = [i for i, processor in enumerate(processors, 1) if not isinstance(processor, _WARPERS)]
    end = max(needs_tokens, default=0)
    return processors[:end], processors[end:]


def sample(logits: torch.Tensor, samplers: Sequence[Sampler], token_ids: Sequence[list[int]]) -> list[int | Exception]:
    """Choose a token for each row of logits [rows, vocab], or tell what went wrong in that row.

    token_ids: prompt and continuation of each row; only read where its sampler needs them.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for row, sampler in enumerate(samplers):
        groups[sampler.group].append(row)
    chosen: dict[int, int | Exception] = {}
    for rows in groups.values():
        own = logits if len(rows) == len(logits) else logits[rows]
        tokens = _sample_group(own, [samplers[row] for row in rows], [token_ids[row] for row in rows])
        chosen.update(zip(rows, tokens, strict=True))
    return [chosen[row] for row in range(len(logits))]


def logprobs(logits: torch.Tensor, chosen: list[int], top: int) -> list[TokenLogprob]:
    """Log-probabilities of the chosen tokens and the `top` most likely, from raw logits [rows, vocab]."""
    scores = logits.float().log_softmax(-1)
    picked = scores[range(len(chosen)), list(chosen)].tolist()
    best = scores.topk(top)
    likely = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    tops = [list(zip(ids, values, strict=True)) for ids, values in likely]
    return list(zip(chosen, picked, tops, strict=True))


def _sample_group(logits: torch.Tensor, samplers: list[Sampler], token_ids: list[list[int]]) -> list[int | Exception]:
    """Rows whose samplers have the same warpers, and are all greedy or all not."""
    scores, failed = _processed(logits, samplers, token_ids)
    try:
        chosen, valid = _greedy(scores) if samplers[0].generator is None else _draw(scores, samplers)
    except Exception as error:
        if len(samplers) == 1:
            return [error]
        rows = range(len(samplers))  # find whose it is
        return [_sample_group(logits[i : i + 1], [samplers[i]], [token_ids[i]])[0] for i in rows]
    return [failed.get(i) or (token if valid[i] else _broken(logits[i])) for i, token in enumerate(chosen)]


def _broken(logits: torch.Tensor) -> EngineError:
    """Why nothing can be chosen, from the row's raw scores [vocab]: they, or what was asked to be made of them."""
    if logits.isnan().any() or logits.isposinf().any():
        return ModelError("the model's scores are not numbers; nothing can be chosen from them")
    return InvalidRequest(
        "the parameters make scores that are not numbers; send penalties and biases nearer to 1 and 0"
    )


def _processed(
    logits: torch.Tensor, samplers: list[Sampler], token_ids: list[list[int]]
) -> tuple[torch.Tensor, dict[int, Exception]]:
    """Scores [rows, vocab] after the row-wise processors, in float32 as in `generate`, and what the grammars leave."""
    failed: dict[int, Exception] = {}
    if not any(sampler.needs_tokens for sampler in samplers):
        return logits, failed
    scores = logits.to(torch.float32, copy=True)
    for i, sampler in enumerate(samplers):
        try:
            if sampler.processors:
                ids = torch.tensor([token_ids[i]], device=scores.device)
                for processor in sampler.processors:
                    scores[i : i + 1] = processor(ids, scores[i : i + 1])
        except ArithmeticError as error:  # a number that the request gave has become too large
            failed[i] = InvalidRequest(f"the parameters cannot be honoured after {len(token_ids[i])} tokens: {error}")
        except Exception as error:  # whatever a processor raises concerns this row alone
            failed[i] = error
    return scores, apply_grammars(scores, logits, [sampler.grammar for sampler in samplers], token_ids) | failed


def largest(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of scores [rows, vocab] in each row, and where the first of them is, as argmax has it; both [rows].
    NaN is larger than any number.

    Looked for in the block that has it: without positions to keep a CPU finds what is largest three times as fast
    (max) to twenty times (argmax, bfloat16).
    """
    vocab_size, blocks = scores.shape[1], scores.shape[1] // _BLOCK
    in_blocks = blocks * _BLOCK
    of_blocks = scores[:, :in_blocks].unflatten(1, (blocks, _BLOCK)).amax(-1)
    if in_blocks < vocab_size:
        of_blocks = torch.cat([of_blocks, scores[:, in_blocks:].amax(-1, keepdim=True)], dim=1)
    best = of_blocks.max(dim=-1)
    columns = best.indices.unsqueeze(1) * _BLOCK + torch.arange(_BLOCK, device=scores.device)
    columns = columns.clamp(max=vocab_size - 1)  # beyond the last one it is the last one's turn again
    at = scores.gather(1, columns).max(dim=-1).indices
    return best.values, columns.gather(1, at.unsqueeze(1)).squeeze(1)


def _greedy(scores: torch.Tensor) -> tuple[list[int], list[bool]]:
    values, tokens = largest(scores)
    return tokens.tolist(), (values > -math.inf).tolist()  # which no NaN is


def _draw(scores: torch.Tensor, samplers: list[Sampler]) -> tuple[list[int], list[bool]]:
    """Sample each row with its own generator, in turns of as many rows as there is memory to sort."""
    most = max(1, DRAWN_LOGITS // scores.shape[-1])
    turns = [slice(at, at + most) for at in range(0, len(samplers), most)]
    drawn = [_draw_at_once(scores[turn], samplers[turn]) for turn in turns]
    return [token for chosen, _ in drawn for token in chosen], [is_valid for _, valid in drawn for is_valid in valid]


def _draw_at_once(scores: torch.Tensor, samplers: list[Sampler]) -> tuple[list[int], list[bool]]:
    """A generator gives one number for each token."""
    uniform = torch.cat([torch.rand(1, 1, generator=s.generator, device=scores.device) for s in samplers])
    chosen = torch.empty(len(samplers), dtype=torch.long, device=scores.device)
    valid = torch.ones(len(samplers), dtype=torch.bool, device=scores.device)
    for rows, candidates, reduced in _candidates(scores.float(), samplers[0].warpers):
        # Inverse of the cumulative distribution: torch.multinomial would draw a number for every candidate.
        cumulative = reduced.softmax(-1).cumsum(-1)
        total = cumulative[:, -1:]
        below = torch.minimum(uniform[rows] * total, total.nextafter(torch.zeros_like(total)))
        at = torch.searchsorted(cumulative, below, right=True).clamp(max=reduced.shape[-1] - 1)
        chosen[rows] = (at if candidates is None else candidates.gather(1, at)).squeeze(1)
        valid[rows] = ~total.isnan().squeeze(1)
    return chosen.tolist(), valid.tolist()


def _candidates(scores: torch.Tensor, warpers: list[Any]):
    """Yield rows that can be reduced alike: (rows, token ids [rows, k] or None for all, warped scores)."""
    everyone = torch.arange(len(scores), device=scores.device)
    kinds = [type(warper) for warper in warpers]
    scaled = kinds[:1] == [library.TemperatureLogitsWarper]
    first = kinds[scaled] if len(kinds) > scaled else None  # the first warper that removes tokens
    if first is library.TopKLogitsWarper:
        best = scores.topk(min(warpers[scaled].top_k + _TIES, scores.shape[-1]))
        yield everyone, best.indices, _warp(best.values, warpers)
        return
    if first is library.TopPLogitsWarper:
        nucleus = warpers[scaled].top_p
        scores = _warp(scores, warpers[:scaled])
        best = scores.topk(min(_NUCLEUS, scores.shape[-1]))
        mass = (best.values.logsumexp(-1) - scores.logsumexp(-1)).exp()
        for row in (mass > nucleus).nonzero().flatten():
            # Among candidates that hold `mass` of the probability, a share of p / mass of theirs is p of all.
            reduced = library.TopPLogitsWarper(nucleus / mass[row].item())(None, best.values[row : row + 1])
            yield row[None], best.indices[row : row + 1], _warp(reduced, warpers[scaled + 1 :])
        # The other rows, among them those whose scores are not numbers: every comparison with them is false.
        everyone, warpers = (~(mass > nucleus)).nonzero().flatten(), warpers[scaled:]
    if len(everyone):
        rest = scores if len(everyone) == len(scores) else scores[everyone]
        yield everyone, None, _warp(rest, warpers)


def _warp(scores: torch.Tensor, warpers: list[Any]) -> torch.Tensor:
    with _QuickSort():
        for warper in warpers:
            scores = warper(None, scores)
    return scores


class _QuickSort(TorchFunctionMode):
    """Within it, torch.sort of float32 on a CPU is numpy's: the library's warpers sort the whole vocabulary."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.sort and args[0].device.type == "cpu" and not (kwargs or {}).get("descending"):
            return _rising(args[0])
        return func(*args, **(kwargs or {}))


def _rising(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.sort(scores, stable=True) of float32 scores [rows, candidates], in a fifth of its time.

    numpy is quick to sort integers: the float's bits, which rise as it does once those of negative ones are turned
    over, and below them where it stands.
    """
    bits = (scores.numpy() + np.float32(0)).view(np.int32)  # + 0 makes 0 of -0, with which it ties
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64) << 32
    keys |= np.arange(scores.shape[-1])
    keys.sort(axis=-1)
    indices = torch.from_numpy(keys & 0xFFFFFFFF)
    return scores.gather(-1, indices), indices
