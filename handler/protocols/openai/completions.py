"""`v1/completions`: one prompt or several, as text or as token ids."""

from itertools import accumulate
from typing import Any

from handler.engine import Job, Sequence
from handler.protocols.base import ModelInfo, validated
from handler.protocols.openai.call import Cursor, OpenAICall
from handler.protocols.openai.schemas import Completion, without_nulls


class CompletionCall(OpenAICall):
    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, body: dict[str, Any], model: ModelInfo):
        completion = validated(Completion, without_nulls(body))
        super().__init__(completion, model)
        self._echo = bool(completion.echo)
        # The engine generates at least one token; with max_tokens 0 it is left out of the answer.
        self._prompt_only = completion.max_tokens == 0
        if self._prompt_only:
            completion = completion.model_copy(update={"max_tokens": 1})
        logprobs = completion.logprobs
        self.requests = [
            completion.request(prompt, logprobs, self._echo and logprobs is not None) for prompt in completion.prompts()
        ]

    def _choice(self, sequence: Sequence) -> dict[str, Any]:
        return self._delta(sequence, sequence.text, Cursor())

    def _delta(self, sequence: Sequence, text: str, cursor: Cursor) -> dict[str, Any]:
        text = "" if self._prompt_only else text
        if self._echo and not cursor.started:
            text = self._model.prompt_text(sequence.job) + text
        asked = sequence.job.params.logprobs is not None
        return {"text": text, "logprobs": self._logprobs(sequence, cursor) if asked else None}

    def _finish_reason(self, sequence: Sequence) -> str | None:
        return "length" if self._prompt_only and sequence.finished else super()._finish_reason(sequence)

    def _count(self, jobs: list[Job]) -> dict[str, int]:
        count = super()._count(jobs)
        if self._prompt_only:
            count |= {"completion_tokens": 0, "total_tokens": count["prompt_tokens"]}
        return count

    def _logprobs(self, sequence: Sequence, cursor: Cursor) -> dict[str, Any]:
        """OpenAI's legacy form: parallel lists over tokens. The first prompt token has no probability."""
        job = sequence.job
        new = [] if self._prompt_only else sequence.logprobs[cursor.logprobs :]
        echo = self._echo and not cursor.started
        entries: list[Any] = [*(job.prompt_logprobs if echo else []), *new]
        token_ids = [*(job.prompt_ids if echo else []), *(token_id for token_id, *_ in new)]
        tokens = [self._token_text(token_id) for token_id in token_ids]
        *offsets, cursor.text_offset = accumulate(map(len, tokens), initial=cursor.text_offset)
        tops = [entry and {self._token_text(token_id): logprob for token_id, logprob in entry[2]} for entry in entries]
        return {
            "tokens": tokens,
            "token_logprobs": [entry and entry[1] for entry in entries],
            "top_logprobs": tops if job.params.logprobs else None,
            "text_offset": offsets,
        }
