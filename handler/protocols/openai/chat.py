"""`v1/chat/completions`: messages, through the tokenizer's chat template."""

from typing import Any

from jinja2 import TemplateError

from handler.engine import InvalidRequest, Sequence
from handler.protocols.base import ModelInfo, validated
from handler.protocols.openai.call import Cursor, OpenAICall
from handler.protocols.openai.schemas import Chat, without_nulls


class ChatCall(OpenAICall):
    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, body: dict[str, Any], model: ModelInfo):
        chat = validated(Chat, without_nulls(body))
        super().__init__(chat, model)
        logprobs = (chat.top_logprobs or 0) if chat.logprobs else None
        self.requests = [chat.request(self._prompt_ids(chat), logprobs)]

    def _prompt_ids(self, chat: Chat) -> list[int]:
        tokenizer = self._model.tokenizer
        if not tokenizer.chat_template:
            raise InvalidRequest("messages: this model's tokenizer has no chat template; use completions with a prompt")
        messages = [message.plain() for message in chat.messages]
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise InvalidRequest(f"messages: the model's chat template refuses them: {error}") from None
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    def _choice(self, sequence: Sequence) -> dict[str, Any]:
        message = {"role": "assistant", "content": sequence.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(sequence, Cursor())}

    def _delta(self, sequence: Sequence, text: str, cursor: Cursor) -> dict[str, Any]:
        role = {} if cursor.started else {"role": "assistant"}
        content = {"content": text} if text or role else {}
        return {"delta": role | content, "logprobs": self._logprobs(sequence, cursor)}

    def _logprobs(self, sequence: Sequence, cursor: Cursor) -> dict[str, Any] | None:
        if sequence.job.params.logprobs is None:
            return None
        content = [
            self._token_logprob(token_id, logprob) | {"top_logprobs": [self._token_logprob(*other) for other in top]}
            for token_id, logprob, top in sequence.logprobs[cursor.logprobs :]
        ]
        return {"content": content, "refusal": None}

    def _token_logprob(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token_id)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}
