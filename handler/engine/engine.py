"""The engine: takes requests, and one `step()` after the other carries all of them on."""

import copy
import itertools
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from . import parameters as params
from .errors import EngineError, InvalidRequest, ModelError, OutOfMemory, PromptTooLong, QueueFull
from .job import Choice, FinishReason, Job, Request
from .kv_cache import KVCache
from .model_runner import ModelRunner
from .sampling import library_processors, logprobs, make_sampler, sample
from .scheduler import Scheduler
from .sequence import Batch, Sequence
from .text import Detokenizer

logger = logging.getLogger(__name__)

_FALLBACK_NEW_TOKENS = 20  # as in transformers' generate
_LIMITS = {"max_new_tokens", "max_length"}
IDLE_CHUNKS = 4  # times prefill_chunk, when there is nobody to be stalled
_ECHO_ROWS = 32  # prompt positions whose float32 scores are held at once


class Engine:
    """Serves many requests at once on one model. Synchronous and single-threaded: the caller drives `step()`.

    model: any causal LM of transformers, also one that Accelerate has dispatched or offloaded.
    tokenizer: its tokenizer.
    max_batch_size: most sequences that run at once.
    max_sequence_length: most tokens of prompt and continuation together; None: the model's limit, else 2048.
    max_prompt_tokens: most tokens of a prompt; None: no limit of its own.
    kv_cache_bytes: most bytes of keys and values; None: max_batch_size x max_sequence_length tokens.
    prefill_chunk: most prompt tokens in one step, so that long prompts do not stall those who decode; four times
        that while nobody decodes.
    max_queue: most sequences that wait to run.
    defaults: generation parameters under `GenerationConfig` names for requests that do not give them. Of the
        model's own generation config only the eos, bos and pad tokens count.
    Raises UnsupportedModel, and InvalidRequest for bad defaults.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        max_batch_size: int = 32,
        max_sequence_length: int | None = None,
        max_prompt_tokens: int | None = None,
        kv_cache_bytes: int | None = None,
        prefill_chunk: int = 256,
        max_queue: int = 256,
        defaults: Mapping[str, Any] | None = None,
    ):
        model.eval()
        self._tokenizer = tokenizer
        self._runner = ModelRunner(model)
        self._defaults = params.checked(defaults or {})
        self._detokenizer = Detokenizer(tokenizer)
        self._library = _with_special_tokens_only(model)
        idle_chunk = IDLE_CHUNKS * prefill_chunk
        if self._runner.window:
            prefill_chunk = idle_chunk = max(1, min(prefill_chunk, self._runner.window // 4))
        self.max_sequence_length = self._runner.length_limit(max_sequence_length, prefill_chunk)
        self.max_prompt_tokens = max_prompt_tokens or self.max_sequence_length
        tokens = max_batch_size * self.max_sequence_length
        self._cache = KVCache(tokens, kv_cache_bytes, self._runner.bytes_per_token)
        self._scheduler = Scheduler(
            self._cache,
            max_batch_size,
            max_queue,
            prefill_chunk,
            idle_chunk,
            one_forward=self._runner.streams_weights,
        )
        self._jobs: dict[str, Job] = {}  # those that are not finished
        self._order = itertools.count()

    @property
    def has_work(self) -> bool:
        """Whether a job is waiting or running."""
        return bool(self._jobs)

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Sequences that wait for one."""
        return len(self._scheduler.waiting)

    def submit(self, request: Request) -> Job:
        """Queue a request; it starts with the next step that has room.

        Raises InvalidRequest, PromptTooLong or QueueFull, and then nothing has changed.
        """
        if request.id in self._jobs:
            raise InvalidRequest(f"id: {request.id!r} is running already; send another id, or none")
        given = params.checked(request.parameters)
        wanted = params.merged(self._defaults, given)
        params.check_request(request, self._runner.vocab_size)
        params.check_ids(wanted, self._runner.vocab_size)
        job = Job(request, self._prompt_ids(request.prompt))
        self._limit_new_tokens(wanted, len(job.prompt_ids), explicit=not _LIMITS.isdisjoint(given))
        count = wanted.pop("num_return_sequences", 1)
        count = request.n if request.n > 1 else count
        waiting, most = len(self._scheduler.waiting), self._scheduler.max_waiting
        if count > most:
            raise InvalidRequest(f"n: {count} is more than may wait; send at most {most}")
        if waiting + count > most:
            raise QueueFull(f"{waiting} sequences wait already; send the request again later")
        if max_time := wanted.pop("max_time", None):
            job.deadline = time.monotonic() + max_time
        self._scheduler.waiting.extend(self._sequences(job, wanted, count))
        self._jobs[job.id] = job
        return job

    @torch.inference_mode()
    def step(self) -> list[Job]:
        """Carry every running job on by one token, or by one chunk of its prompt.

        Returns the jobs with something new: more text, or their end.
        """
        before = {job.id: (job, _visible(job)) for job in self._jobs.values()}
        self._expire()
        results = [(batch, self._run(batch)) for batch in self._scheduler.schedule()]
        for batch, result in results:
            try:
                self._postprocess(batch, result)
            except Exception as error:  # a bug of ours, or no memory for float32 scores
                for sequence in batch.sequences:
                    self._fail(sequence.job, _as_engine_error(error))
        self._scheduler.release_finished()
        return [job for job, seen in before.values() if job.finished or _visible(job) > seen]

    @torch.inference_mode()
    def cancel(self, job_id: str) -> None:
        """End a job and free its rows. An id that is not running is ignored."""
        if job := self._jobs.get(job_id):
            self._end(job, "cancel")
            self._scheduler.release_finished()

    def generate(self, prompts: str | Iterable[str | list[int]], **parameters: Any) -> list[Job]:
        """Submit all prompts with the same parameters and step until they are done."""
        jobs = []
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            while len(self._scheduler.waiting) >= self._scheduler.max_waiting:
                self.step()
            jobs.append(self.submit(Request(prompt, parameters)))
        while not all(job.finished for job in jobs):
            self.step()
        return jobs

    # submit: from a request to sequences

    def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            try:
                ids = list(self._tokenizer(prompt).input_ids)
            except (TypeError, ValueError) as error:  # half a surrogate pair, for one
                raise InvalidRequest(f"prompt: send text that can be tokenized: {error}") from error
        elif isinstance(prompt, list | tuple) and all(type(i) is int for i in prompt):
            ids = list(prompt)
        else:
            raise InvalidRequest("prompt: send a string or a list of token ids")
        if not ids and self._tokenizer.bos_token_id is None:
            raise InvalidRequest("prompt: it is empty and the tokenizer has no bos token; send some text")
        ids = ids or [self._tokenizer.bos_token_id]
        if not all(0 <= i < self._runner.vocab_size for i in ids):
            raise InvalidRequest(f"prompt: token ids must be at least 0 and below {self._runner.vocab_size}")
        return ids

    def _limit_new_tokens(self, wanted: dict[str, Any], prompt: int, explicit: bool) -> None:
        """Put the number of new tokens into `wanted["max_new_tokens"]`. A default gives way to what fits."""
        longest = min(self.max_sequence_length, self._cache.max_cells)
        allowed = min(self.max_prompt_tokens, longest - 1)
        if prompt > allowed:
            raise PromptTooLong(f"the prompt has {prompt} tokens, at most {allowed} fit; send fewer")
        total = wanted.pop("max_length", None)
        if "max_new_tokens" not in wanted and total is not None and total <= prompt:
            raise PromptTooLong(f"the prompt has {prompt} tokens, max_length is {total}; raise it")
        new = wanted.get("max_new_tokens") or (total - prompt if total else _FALLBACK_NEW_TOKENS)
        if explicit and prompt + new > longest:
            raise PromptTooLong(
                f"prompt and max_new_tokens are {prompt} + {new} = {prompt + new} tokens, at most {longest} "
                f"fit; send a shorter prompt or max_new_tokens of at most {longest - prompt}"
            )
        wanted["max_new_tokens"] = min(new, longest - prompt)

    def _sequences(self, job: Job, wanted: dict[str, Any], count: int) -> list[Sequence]:
        request = job.request
        seed = wanted.pop("seed", None)
        seed = request.seed if request.seed is not None else seed
        stop = params.stop_strings(request.stop, wanted.pop("stop_strings", None))
        if request.ignore_eos:  # nothing can end it early
            wanted = {k: v for k, v in wanted.items() if k not in ("min_new_tokens", "min_length")}
        runner = self._runner
        processors, eos = library_processors(self._library, job.prompt_ids, wanted, runner.device, runner.vocab_size)
        sequences = []
        for index in range(count):
            choice = Choice(index, self._detokenizer.stream(job.prompt_ids, stop))
            generator = self._generator(seed, index) if wanted.get("do_sample") else None
            sampler = make_sampler(request, processors, len(job.prompt_ids), generator)
            eos = frozenset() if request.ignore_eos else eos
            sequences.append(Sequence(job, choice, sampler, wanted["max_new_tokens"], eos, next(self._order)))
        job.choices = [sequence.choice for sequence in sequences]
        return sequences

    def _generator(self, seed: int | None, index: int) -> torch.Generator:
        generator = torch.Generator(self._runner.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed + index)
        return generator

    # step: schedule, run, postprocess. Only `_postprocess` and `_end` change sequences.

    def _expire(self) -> None:
        expired = [job for job in self._jobs.values() if job.expired]
        for job in expired:
            self._end(job, "time")
        if expired:
            self._scheduler.release_finished()

    def _run(self, batch: Batch) -> torch.Tensor | EngineError:
        """Logits [sum(batch.kept), vocab], or what went wrong for all of the batch."""
        try:
            return self._runner.forward(self._cache, batch, self._scheduler.shape())
        except Exception as error:
            return _as_engine_error(error)

    def _postprocess(self, batch: Batch, logits: torch.Tensor | EngineError) -> None:
        if isinstance(logits, EngineError):
            self._fail_batch(batch, logits)
            return
        ends = list(itertools.accumulate(batch.kept))
        for sequence, end, kept in zip(batch.sequences, ends, batch.kept, strict=True):
            if sequence.echoes:
                _echo(sequence, logits[end - kept : end])
        ready = [i for i in range(len(ends)) if batch.completes(i)]
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            sequence.cached += count
        if ready:
            last = logits if len(ready) == len(logits) else logits[[ends[i] - 1 for i in ready]]
            self._choose([batch.sequences[i] for i in ready], last)

    def _choose(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        """Sample from logits [sequences, vocab] and give each sequence its token."""
        tokens = sample(logits, sequences)
        self._report_logprobs(sequences, tokens, logits)
        for sequence, token in zip(sequences, tokens, strict=True):
            if sequence.choice.finish_reason:
                continue  # another choice of the same job has failed
            try:
                self._append(sequence, token)
            except Exception as error:
                self._fail(sequence.job, error)

    def _report_logprobs(self, sequences: list[Sequence], tokens: list[int | Exception], logits: torch.Tensor) -> None:
        asked = [sequence.job.request.logprobs for sequence in sequences]
        chosen = {r: t for r, t in enumerate(tokens) if isinstance(t, int) and asked[r] is not None}
        if not chosen:
            return
        most = max(asked[row] or 0 for row in chosen)
        entries = logprobs(logits[list(chosen)], list(chosen.values()), most)
        for row, (token, logprob, best) in zip(chosen, entries, strict=True):
            sequences[row].choice.logprobs.append((token, logprob, best[: asked[row]]))

    def _append(self, sequence: Sequence, token: int | Exception) -> None:
        if isinstance(token, Exception):
            raise token
        choice = sequence.choice
        choice.token_ids.append(token)
        if choice.stream.push(token) or token in sequence.eos:
            self._finish(sequence.job, choice, "stop")
        elif len(choice.token_ids) == sequence.max_new_tokens:
            self._finish(sequence.job, choice, "length")

    def _fail_batch(self, batch: Batch, error: EngineError) -> None:
        """The forward changed nothing. Without memory the youngest goes and the others try again. Prompts are
        prefilled in order, so if any is not through, the youngest is not."""
        victims = batch.sequences
        if isinstance(error, OutOfMemory):
            running = [s for s in self._scheduler.running if not s.choice.finish_reason]
            victims = [max(running, key=lambda s: s.order)] if running else []
            if self._runner.device.type == "cuda":
                torch.cuda.empty_cache()
        for sequence in victims:
            self._fail(sequence.job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        if job.finished:
            return
        job.error = _as_engine_error(error)
        self._cache.scrub([s.row for s in self._scheduler.running if s.job is job])
        self._end(job, "error")

    def _end(self, job: Job, reason: FinishReason) -> None:
        for choice in job.choices:
            if not choice.finish_reason:
                self._finish(job, choice, reason)

    def _finish(self, job: Job, choice: Choice, reason: FinishReason) -> None:
        if reason != "error":
            choice.stream.flush()
        choice.finish_reason = reason
        if job.finished:
            self._jobs.pop(job.id)


def _with_special_tokens_only(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, its generation config reduced to special tokens: `generate` fills gaps from there, and
    a checkpoint's temperature must not turn sampling on. A shallow copy; the weights are shared."""
    own = model.generation_config
    twin = copy.copy(model)
    twin.generation_config = GenerationConfig(
        eos_token_id=own.eos_token_id, bos_token_id=own.bos_token_id, pad_token_id=own.pad_token_id
    )
    return twin


def _echo(sequence: Sequence, logits: torch.Tensor) -> None:
    """Append prompt logprobs from logits [new, vocab] of the prompt's next positions."""
    job, start = sequence.job, sequence.cached
    if start == 0:
        job.prompt_logprobs.append(None)
    for at in range(0, len(logits), _ECHO_ROWS):
        targets = job.prompt_ids[start + at + 1 :][: min(_ECHO_ROWS, len(logits) - at)]
        job.prompt_logprobs += logprobs(logits[at : at + len(targets)], targets, job.request.logprobs or 0)


def _visible(job: Job) -> int:
    return sum(len(choice.text) for choice in job.choices)


def _as_engine_error(error: Exception) -> EngineError:
    """The error in words. Its traceback, which would keep the forward's tensors alive, goes to the log."""
    if isinstance(error, EngineError):
        return error
    logger.error("a step failed", exc_info=error)
    words = ("not enough memory", "out of memory", "can't allocate memory")
    no_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    no_memory = no_memory or any(word in str(error).lower() for word in words)
    kind = OutOfMemory if no_memory else ModelError
    return kind(f"{type(error).__name__}: {error}")
