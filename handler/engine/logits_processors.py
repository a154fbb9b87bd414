"""Logits processors of our own: OpenAI's penalties, and the library's where its own take long."""

import math
import sys

import torch
from transformers import LogitsProcessor
from transformers.generation import logits_process as library

from .sampling_params import SamplingParams


def quick_equivalent(processor: LogitsProcessor, prompt: torch.Tensor, vocab_size: int) -> LogitsProcessor:
    """The same processor; in its own form where the library's takes long: it looks each token of the vocabulary up in a
    list at every step, compares whole n-grams, and counts a prompt's n-grams in quadratic time. prompt: [tokens]."""
    match processor:
        case library.SuppressTokensLogitsProcessor():
            return SuppressedTokens(processor.suppress_tokens, vocab_size, range(sys.maxsize))
        case library.SuppressTokensAtBeginLogitsProcessor():
            at = range(processor.begin_index, processor.begin_index + 1)
            return SuppressedTokens(processor.begin_suppress_tokens, vocab_size, at)
        case library.MinLengthLogitsProcessor():
            return SuppressedTokens(processor.eos_token_id, vocab_size, range(processor.min_length))
        case library.MinNewTokensLengthLogitsProcessor():
            before = range(processor.prompt_length_to_skip + processor.min_new_tokens)
            return SuppressedTokens(processor.eos_token_id, vocab_size, before)
        case library.NoRepeatNGramLogitsProcessor():
            return NoRepeatedNGram(processor.ngram_size)
        case library.EncoderNoRepeatNGramLogitsProcessor():
            return NoRepeatedNGram(processor.ngram_size, prompt)
    return processor


class SuppressedTokens(LogitsProcessor):
    """No score for `tokens` [count] while prompt and continuation have one of the `lengths`."""

    def __init__(self, tokens: torch.Tensor, vocab_size: int, lengths: range):
        self._tokens, self._lengths = tokens[(tokens >= 0) & (tokens < vocab_size)], lengths

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[-1] not in self._lengths:
            return scores
        return scores.index_fill(1, self._tokens.to(scores.device), -math.inf)


class NoRepeatedNGram(LogitsProcessor):
    """No score for tokens that complete an n-gram of `size` that was there before: anywhere, or in the `prompt`
    [tokens]."""

    def __init__(self, size: int, prompt: torch.Tensor | None = None):
        self._size, self._prompt = size, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens = input_ids[0]
        earlier = tokens if self._prompt is None else self._prompt
        last = torch.arange(len(earlier), device=tokens.device)[self._size - 1 :]  # of each n-gram
        for back in range(1, self._size):
            if not len(last):
                break
            last = last[earlier[last - back] == tokens[-back]]
        return scores.index_fill(1, earlier[last], -math.inf)


class OpenAIPenalties(LogitsProcessor):
    """Scores + logit_bias, - presence_penalty - frequency_penalty x count for each generated token."""

    def __init__(self, params: SamplingParams, prompt_length: int):
        self._presence, self._frequency = params.presence_penalty, params.frequency_penalty
        self._prompt_length = prompt_length
        self._biased = torch.tensor(list(params.logit_bias), dtype=torch.long)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        tokens, counts = input_ids[0, self._prompt_length :].unique(return_counts=True)
        scores[0, tokens] -= self._presence + self._frequency * counts
        scores[0, self._biased.to(scores.device)] += self._bias.to(scores.device)
        return scores
