"""`v1/completions`: the answers' own form."""

from typing import Any

from handler.engine import Job, Request, Sequence
from handler.engine.sampler import TokenLogprob
from handler.protocols.base import ModelInfo, validated
from handler.protocols.openai.call import Cursor, OpenAICall, finite
from handler.protocols.openai.schemas import Completion
from handler.protocols.token_text import Piece


class CompletionCall(OpenAICall):
    """`v1/completions`: one prompt or several, as text or as token ids."""

    protocol = "openai_completions"
    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, body: dict[str, Any], model: ModelInfo):
        completion = validated(Completion, body)
        super().__init__(completion, model)
        self._echo = bool(completion.echo)
        # The engine generates at least one token; with max_tokens 0 it is left out of the answer.
        self._prompt_only = completion.max_tokens == 0
        if self._prompt_only:
            completion = completion.model_copy(update={"max_tokens": 1})
        self._completion, self.prompts = completion, completion.prompt

    def request(self, prompt: str | list[int]) -> Request:
        logprobs = self._completion.logprobs
        return self._completion.request(prompt, logprobs, self._echo and logprobs is not None)

    def _choice(self, sequence: Sequence) -> dict[str, Any]:
        text = "" if self._prompt_only else sequence.text
        return {"text": self._model.prompt_text(sequence.job) + text if self._echo else text}

    def _delta(self, sequence: Sequence, text: str, cursor: Cursor) -> dict[str, Any]:
        text = "" if self._prompt_only else text
        if self._echo and not cursor.started:
            text = self._model.prompt_text(sequence.job) + text
        return {"text": text}

    def _finish_reason(self, sequence: Sequence) -> str | None:
        return "length" if self._prompt_only and sequence.finished else super()._finish_reason(sequence)

    def _usage(self, jobs: list[Job]) -> dict[str, int]:
        usage = super()._usage(jobs)
        if self._prompt_only:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage

    def _logprobs(self, sequence: Sequence, cursor: Cursor) -> dict[str, Any]:
        """OpenAI's legacy form: parallel lists over tokens. The first prompt token has no probability."""
        job, tokens, entries = sequence.job, self._model.token_text, list[tuple[Piece, int, TokenLogprob | None]]()
        if self._echo and not cursor.started:
            entries += zip(tokens.of_prompt(job.prompt_ids), job.prompt_ids, job.prompt_logprobs, strict=True)
        if not self._prompt_only:
            start = len(self._model.prompt_text(job)) if self._echo else 0
            new = self._new_logprobs(sequence, cursor)
            entries += [(Piece(piece.text, start + piece.end), entry[0], entry) for piece, entry in new]
        shown = [tokens.shown(token_id, piece) for piece, token_id, _ in entries]
        tops = [
            entry and {tokens.own(other)[0]: finite(logprob) for other, logprob in entry[2]} for *_, entry in entries
        ]
        return {
            "tokens": [text for text, _ in shown],
            "token_logprobs": [entry and finite(entry[1]) for *_, entry in entries],
            "top_logprobs": tops if job.params.logprobs else None,
            "text_offset": [
                piece.end - len(piece.text if data else text)
                for (piece, *_), (text, data) in zip(entries, shown, strict=True)
            ],
        }
