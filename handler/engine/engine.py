"""The engine: takes requests, and one `step()` after the other carries all of them on."""

import copy
import itertools
import logging
import math
import time
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from handler.settings import EngineConfig

from .architecture import Architecture
from .capacity import PROMPT_LOGPROB_ROWS, Capacity
from .detokenizer import Detokenizer
from .errors import CacheSpoiled, EngineError, InvalidRequest, OutOfMemory, QueueTimeout, as_engine_error
from .forward_cost import ForwardCost
from .grammar_compiler import GrammarCompiler
from .kv_cache import KVCache
from .model_runner import ModelRunner
from .prompt import encode
from .request import Request
from .sampler import logprobs, make_samplers, sample
from .sampling_params import checked, resolve
from .scheduler import Batch, Scheduler
from .self_check import check_rows
from .sequence import FinishReason, Job, Sequence
from .speculation import RESIDENT_ROWS, Speculator
from .stats import EngineStats

logger = logging.getLogger(__name__)

_COMPILE_WAIT = 0.01  # seconds that a step with nothing to run waits for a grammar


class Engine:
    """Serves many requests at once on one model. Synchronous and single-threaded: the caller drives `step()`.

    model: any causal LM of transformers, also one that Accelerate has dispatched or offloaded. Of its own generation
        config only the eos, bos and pad tokens count.
    tokenizer: its tokenizer.
    config: limits, and the generation parameters of requests that do not give them.
    Raises UnsupportedModel.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, config: EngineConfig | None = None):
        config = config or EngineConfig()
        model.eval()
        architecture = Architecture.of(model)
        check_rows(model, architecture)
        self.capacity = Capacity.of(architecture, config)
        self._max_wait, self._prefix_cache = config.max_wait, config.prefix_cache
        self._vocab_size, self._longrope_border = architecture.vocab_size, architecture.longrope_border
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer)
        self._defaults = {"max_new_tokens": config.max_new_tokens} | checked(config.generation)
        self._processor_source = _with_special_tokens_only(model)
        self._cache = KVCache(self.capacity.kv_cache_tokens, config.kv_cache_memory, architecture.kv_bytes_per_token)
        self._runner = ModelRunner(model, architecture, self._cache)
        # By bytes read, which is about what both cost on a CPU; on a GPU a pass costs its kernels' launches.
        is_read = self._runner.device.type == "cpu"
        pass_columns = model.get_memory_footprint() / architecture.kv_bytes_per_token if is_read else math.inf
        self._cost, streams = ForwardCost(), self._runner.streams_weights
        self._scheduler = Scheduler(self._cache, config, self.capacity, streams, self._cost, pass_columns)
        most_rows = config.max_batch_size if streams else RESIDENT_ROWS if is_read else 0
        self.speculator = Speculator(config.num_speculative_tokens, most_rows, self.capacity, self._cache, self._cost)
        self.max_queue = config.max_queue
        self._grammars = GrammarCompiler(tokenizer, self._vocab_size)
        self.forward_seconds = 0.0  # for how long the model has run so far
        self.stats = EngineStats()
        self._jobs: dict[str, Job] = {}  # those that are not finished
        self._order = itertools.count()

    @property
    def has_work(self) -> bool:
        """Whether a job is waiting or running."""
        return bool(self._jobs)

    @property
    def num_running(self) -> int:
        """Sequences that hold a row of the cache."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for one, or for their grammar."""
        return len(self._scheduler.waiting)

    @property
    def kv_tokens_used(self) -> int:
        """Tokens of the cache that nobody else can have: as many for each running sequence as the longest one has."""
        return self._scheduler.used_tokens

    @property
    def kv_tokens_free(self) -> int:
        """Tokens that the cache has besides."""
        return max(0, self._cache.capacity_tokens - self.kv_tokens_used)

    @property
    def num_reused_tokens(self) -> int:
        """Prompt tokens so far whose keys and values were there already."""
        return self._scheduler.num_reused_tokens

    @property
    def bytes_to_come(self) -> int:
        """Memory of the host that the forward which begins may take besides what is taken already."""
        return self._runner.bytes_to_come if self._runner.device.type == "cpu" else 0

    def encode(self, prompt: str | list[int], add_special_tokens: bool = True) -> list[int]:
        """The token ids of a prompt that fits, for a `Request`. May be called from any thread: a long text takes long.

        Raises InvalidRequest or PromptTooLong.
        """
        allowed = min(self.capacity.max_prompt_tokens, self._max_length - 1)
        return encode(self._tokenizer, prompt, allowed, self._vocab_size, add_special_tokens)

    def submit(self, request: Request) -> Job:
        """Queue a request; it starts with the next step that has room.

        Raises InvalidRequest, PromptTooLong or QueueFull, and then nothing has changed.
        """
        if request.id in self._jobs:
            raise InvalidRequest(f"id: {request.id!r} is running already; send another id, or none")
        prompt_ids = self.encode(request.prompt, request.add_special_tokens)
        params = resolve(request, len(prompt_ids), self._defaults, self._vocab_size, self._max_length)
        self._scheduler.check_queue_room(params.n)
        job = Job(request, params, prompt_ids)
        job.prefix_owner = self._prefix_owner(request.cache_salt)
        if params.grammar:
            job.compilation = self._grammars.compile(params.grammar, job.group)
        job.sequences = self._make_sequences(job)
        self._scheduler.add(job.sequences)
        job.submitted_at = job.waiting_since = time.monotonic()
        if params.max_time is not None:
            job.deadline = job.waiting_since + params.max_time
        self._jobs[job.id] = job
        return job

    @torch.inference_mode()
    def step(self) -> list[Job]:
        """Carry every running job on by one token, or by one chunk of its prompt.

        Returns the jobs with something new: more text, or their end.
        """
        jobs = {job.id: (job, _text_length(job)) for job in self._jobs.values()}
        self._end_expired()
        batches = self._schedule()
        self._note_started()
        if not batches:  # whoever steps on and on would take the time to compile in
            futures = [job.compilation.future for job in self._jobs.values() if job.compilation]
            wait(futures, _COMPILE_WAIT, FIRST_COMPLETED)
        for batch in batches:
            try:
                self._postprocess(batch, self._run(batch))  # whose logits are free before the next needs memory
            except CacheSpoiled:
                self._scheduler.preempt_all(zero=True)
                break
            except Exception as error:  # a bug of ours, or no memory for float32 scores
                for sequence in batch.sequences:
                    self._fail(sequence.job, error)
        self._scheduler.release_finished()
        return [job for job, length in jobs.values() if job.finished or _text_length(job) > length]

    @torch.inference_mode()
    def cancel(self, job_id: str) -> None:
        """End a job and free its rows. An id that is not running is ignored."""
        if job := self._jobs.get(job_id):
            self._end(job, "cancel")
            self._scheduler.release_finished()

    # submit: from a request to sequences

    @property
    def _max_length(self) -> int:
        """Most tokens of prompt and continuation that the model, the settings and the cache have room for."""
        return min(self.capacity.max_sequence_length, self._cache.capacity_tokens)

    def _prefix_owner(self, cache_salt: str | None) -> str | None:
        # With longrope the same tokens have other keys in long texts.
        if self._prefix_cache == "off" or self._longrope_border is not None:
            return None
        return cache_salt or ("" if self._prefix_cache == "shared" else None)

    def _make_sequences(self, job: Job) -> list[Sequence]:
        samplers, eos_token_ids = make_samplers(
            self._processor_source, job.prompt_ids, job.params, self._runner.device, self._vocab_size, job.compilation
        )
        return [
            Sequence(
                job=job,
                index=index,
                sampler=sampler,
                text_stream=self._detokenizer.stream(job.prompt_ids, job.params.stop, job.params.min_new_tokens),
                eos_token_ids=eos_token_ids,
                order=next(self._order),
            )
            for index, sampler in enumerate(samplers)
        ]

    # step: run the scheduler's batches, and give each sequence what came of it

    def _schedule(self) -> list[Batch]:
        """This step's forwards; none where rows cannot be moved. Some may be then, so all are computed again."""
        try:
            batches = self._scheduler.schedule()
            self.speculator.add_drafts(batches)
            return batches
        except Exception as error:
            self._fail_batch(Batch(list(self._scheduler.running)), as_engine_error(error))
            self._scheduler.preempt_all()
            return []

    def _note_started(self) -> None:
        now = time.monotonic()
        for job in {sequence.job.id: sequence.job for sequence in self._scheduler.running}.values():
            if job.started_at is None:
                job.started_at = now
                self.stats.queue.observe(now - job.submitted_at)

    def _run(self, batch: Batch) -> torch.Tensor | EngineError:
        """Logits [sum(batch.logits_to_keep), vocab], or what went wrong for all of the batch."""
        start, waited = time.monotonic(), self._runner.wait_seconds
        try:
            logits = self._runner.forward(batch)
            self._cost.record(batch.num_positions, time.monotonic() - start, self._runner.wait_seconds - waited)
            return logits
        except CacheSpoiled:
            raise
        except Exception as error:
            return as_engine_error(error)
        finally:
            self.forward_seconds += time.monotonic() - start

    def _postprocess(self, batch: Batch, logits: torch.Tensor | EngineError) -> None:
        if isinstance(logits, EngineError):
            self._fail_batch(batch, logits)
            return
        logits_to_keep = batch.logits_to_keep
        ends = list(itertools.accumulate(logits_to_keep))
        for sequence, end, count in zip(batch.sequences, ends, logits_to_keep, strict=True):
            if sequence.needs_prompt_logprobs:
                _report_prompt_logprobs(sequence, logits[end - count : end])
        chains = {}
        for index, sequence in enumerate(batch.sequences):
            if batch.completes(index):
                drafts = batch.drafts(index)
                chains[sequence] = ends[index] - 1 - len(drafts), drafts
            sequence.num_cached_tokens += batch.num_own_tokens(index)
        self._verify(chains, logits)

    def _verify(self, chains: dict[Sequence, tuple[int, list[int]]], logits: torch.Tensor) -> None:
        """Sample after the last token of each sequence, and after each of its drafts as long as it is what was sampled.

        chains: the row of logits [positions, vocab] that comes of a sequence's last token, and its drafts; the rows
            that come of these are the next ones.
        """
        lengths = {sequence: len(sequence.token_ids) for sequence in chains}
        going_on, depth = chains, 0
        while going_on:
            rows = [row + depth for row, _ in going_on.values()]
            self._sample(list(going_on), logits if rows == list(range(len(logits))) else logits[rows])
            going_on = {s: chain for s, chain in going_on.items() if _goes_on(s, chain[1][depth : depth + 1])}
            for sequence in going_on:
                sequence.num_cached_tokens += 1
            depth += 1
        for sequence, (_, drafts) in chains.items():
            sampled = sequence.token_ids[lengths[sequence] :]
            self.speculator.learn(sequence, len(drafts), sum(map(int.__eq__, sampled, drafts)))

    def _sample(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        """Sample from logits [sequences, vocab] and append to each sequence its token."""
        samplers = [sequence.sampler for sequence in sequences]
        token_ids = [sequence.all_token_ids if sequence.sampler.needs_tokens else [] for sequence in sequences]
        tokens = sample(logits, samplers, token_ids)
        _report_logprobs(sequences, tokens, logits)
        for sequence, token in zip(sequences, tokens, strict=True):
            if sequence.finished:
                continue  # another sequence of the same job has failed
            try:
                self._append(sequence, token)
            except Exception as error:
                self._fail(sequence.job, error)

    def _append(self, sequence: Sequence, token: int | Exception) -> None:
        if isinstance(token, Exception):
            raise token
        sequence.token_ids.append(token)
        self._note_token(sequence)
        if sequence.text_stream.push(token) or token in sequence.eos_token_ids:
            self._finish(sequence, "stop")
        elif sequence.length == sequence.max_length:
            self._finish(sequence, "length")
        elif sequence.length - 1 == self._longrope_border:
            sequence.num_cached_tokens, sequence.shares_prompt = 0, False  # its keys are now rotated by other factors

    def _note_token(self, sequence: Sequence) -> None:
        now, job, stats = time.monotonic(), sequence.job, self.stats
        stats.generated_tokens += 1
        if job.first_token_at is None:
            job.first_token_at = now
            stats.prompt_tokens += len(job.prompt_ids)
            stats.first_token.observe(now - job.submitted_at)
        if sequence.last_token_at is not None:
            stats.between_tokens.observe(now - sequence.last_token_at)
        sequence.last_token_at = now

    # every end of a sequence: its own, its job's, or that of a step that failed

    def _fail_batch(self, batch: Batch, error: EngineError) -> None:
        """The forward changed nothing. Without memory the youngest goes and the others try again. Prompts are
        prefilled in order, so if any is not through, the youngest is not."""
        victims = batch.sequences
        if isinstance(error, OutOfMemory):
            running = [sequence for sequence in self._scheduler.running if not sequence.finished]
            victims = [max(running, key=lambda sequence: sequence.order)] if running else []
            self._runner.release_memory()
            if draft := self.speculator.draft_model:
                draft.release_memory()
        for sequence in victims:
            self._fail(sequence.job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        if job.finished:
            return
        job.error = as_engine_error(error)
        self._end(job, "error")

    def _end_expired(self) -> None:
        """End jobs whose grammar is refused, whose deadline is over, and that have waited too long, nothing of their
        group having run."""
        now = time.monotonic()
        served = {sequence.job.group for sequence in self._scheduler.running}
        for job in list(self._jobs.values()):
            if job.group in served:
                job.waiting_since = now
            if job.compilation and (refusal := job.compilation.error):
                self._fail(job, refusal)
            elif job.deadline is not None and now >= job.deadline:
                self._end(job, "time")
            elif now - job.waiting_since >= self._max_wait and not any(s.token_ids for s in job.sequences):
                waited = f"the request waited {self._max_wait:g} s and nothing of it has run; send it again later"
                self._fail(job, QueueTimeout(waited))
        self._scheduler.release_finished()

    def _end(self, job: Job, reason: FinishReason) -> None:
        for sequence in job.sequences:
            if not sequence.finished:
                self._finish(sequence, reason)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if reason != "error":
            sequence.text_stream.flush()
        sequence.finish_reason = reason
        if sequence.job.finished:
            self._jobs.pop(sequence.job.id)


def _with_special_tokens_only(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, its generation config reduced to special tokens: `generate` fills gaps from there, and
    a checkpoint's temperature must not turn sampling on. A shallow copy; the weights are shared."""
    own = model.generation_config
    twin = copy.copy(model)
    twin.generation_config = GenerationConfig(
        eos_token_id=own.eos_token_id, bos_token_id=own.bos_token_id, pad_token_id=own.pad_token_id
    )
    return twin


def _goes_on(sequence: Sequence, draft: list[int]) -> bool:
    """Whether the token sampled last is that draft, if there is one, so that what the forward made of it counts."""
    is_draft = sequence.token_ids[-1:] == draft and not sequence.finished
    return is_draft and sequence.num_cached_tokens == sequence.length - 1  # not where all keys are to be made anew


def _report_logprobs(sequences: list[Sequence], tokens: list[int | Exception], logits: torch.Tensor) -> None:
    """Append the log-probabilities of new tokens, from logits [sequences, vocab], where they are asked for."""
    asked = [sequence.job.params.logprobs for sequence in sequences]
    chosen = {row: token for row, token in enumerate(tokens) if isinstance(token, int) and asked[row] is not None}
    if not chosen:
        return
    most = max(asked[row] or 0 for row in chosen)
    entries = logprobs(logits[list(chosen)], list(chosen.values()), most)
    for row, (token, logprob, top) in zip(chosen, entries, strict=True):
        sequences[row].logprobs.append((token, logprob, top[: asked[row]]))


def _report_prompt_logprobs(sequence: Sequence, logits: torch.Tensor) -> None:
    """Append log-probabilities of prompt tokens, from logits [new, vocab] of the prompt's next positions."""
    job, start = sequence.job, sequence.num_cached_tokens
    if start == 0:
        job.prompt_logprobs = [None]  # anew, if it was preempted in the middle of its prompt
    for at in range(0, len(logits), PROMPT_LOGPROB_ROWS):
        targets = job.prompt_ids[start + at + 1 :][: min(PROMPT_LOGPROB_ROWS, len(logits) - at)]
        job.prompt_logprobs += logprobs(logits[at : at + len(targets)], targets, job.params.logprobs or 0)


def _text_length(job: Job) -> int:
    return sum(len(sequence.text) for sequence in job.sequences)
