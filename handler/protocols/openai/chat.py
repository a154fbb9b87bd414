"""`v1/chat/completions`: the answers' own form, the chat template and the calls of tools."""

from typing import Any

from handler.engine import InvalidRequest, PromptTooLong, Request, Sequence
from handler.engine.detokenizer import REPLACEMENT
from handler.protocols.base import ModelInfo, validated
from handler.protocols.openai.call import Cursor, OpenAICall, finite
from handler.protocols.openai.schemas import Chat
from handler.protocols.openai.tools import certain_content, split_calls


class ChatCall(OpenAICall):
    """`v1/chat/completions`: messages, through the tokenizer's chat template, which writes special tokens too."""

    add_special_tokens = False

    protocol = "openai_chat"
    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, body: dict[str, Any], model: ModelInfo):
        _check_message_count(body.get("messages"), model)
        chat = validated(Chat, body)
        super().__init__(chat, model)
        self._chat = chat
        self._tools = {tool.function.name for tool in chat.offered_tools()}
        self._split: dict[int, tuple[str, list[dict[str, Any]]]] = {}  # content and calls, by the index of the choice
        self.prompts = [_prompt(chat, model)]

    def request(self, prompt: str | list[int]) -> Request:
        request = self._chat.request(prompt, (self._chat.top_logprobs or 0) if self._chat.logprobs else None)
        # Templates end a message with the tokenizer's eos token, whatever generation_config.json says.
        eos = self._model.tokenizer.eos_token_id
        request.eos_token_ids = () if eos is None else (eos,)
        return request

    def _shown(self, sequence: Sequence) -> str:
        if not self._tools:
            return sequence.text
        return self._content_and_calls(sequence)[0] if sequence.finished else certain_content(sequence.text)

    def _content_and_calls(self, sequence: Sequence) -> tuple[str, list[dict[str, Any]]]:
        """Of a sequence that is finished. Made once, because the calls get their ids here."""
        if sequence.index not in self._split:
            content, calls = split_calls(sequence.text, self._tools)
            self._split[sequence.index] = content, calls if self._chat.parallel_tool_calls else calls[:1]
        return self._split[sequence.index]

    def _finish_reason(self, sequence: Sequence) -> str | None:
        reason = super()._finish_reason(sequence)
        return "tool_calls" if reason == "stop" and self._content_and_calls(sequence)[1] else reason

    def _choice(self, sequence: Sequence) -> dict[str, Any]:
        content, calls = self._content_and_calls(sequence)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        return {"message": message}

    def _delta(self, sequence: Sequence, text: str, cursor: Cursor) -> dict[str, Any]:
        delta: dict[str, Any] = {} if cursor.started else {"role": "assistant"}
        if text or delta:
            delta["content"] = text
        if sequence.finished and (calls := self._content_and_calls(sequence)[1]):
            delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
        return {"delta": delta}

    def _logprobs(self, sequence: Sequence, cursor: Cursor) -> dict[str, Any]:
        tokens = self._model.token_text
        content = [
            _token_logprob(*tokens.shown(token_id, piece), logprob)
            | {"top_logprobs": [_token_logprob(*tokens.own(other), value) for other, value in top]}
            for piece, (token_id, logprob, top) in self._new_logprobs(sequence, cursor)
        ]
        return {"content": content, "refusal": None}


def _check_message_count(messages: Any, model: ModelInfo) -> None:
    """Raises PromptTooLong for more messages than the model takes tokens, before any time is spent on them."""
    if isinstance(messages, list) and len(messages) > model.max_sequence_length:
        raise PromptTooLong(f"messages: there are {len(messages)}, at most {model.max_sequence_length} tokens fit")


def _prompt(chat: Chat, model: ModelInfo) -> str:
    """The conversation as the model's chat template writes it. Raises InvalidRequest."""
    tokenizer = model.tokenizer
    if not tokenizer.chat_template:
        raise InvalidRequest("messages: this model's tokenizer has no chat template; use completions with a prompt")
    tools: list[Any] | None = [tool.for_template() for tool in chat.offered_tools()] or None
    template = tokenizer.get_chat_template(None, tools)
    if tools and "tools" not in template:
        raise InvalidRequest("tools: this model's chat template has no place for them; leave them out")
    if any(message.tool_calls for message in chat.messages) and "tool_calls" not in template:
        raise InvalidRequest("messages: this model's chat template has no place for tool_calls; leave them out")
    messages = [message.for_template() for message in chat.messages]
    try:
        text = str(tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False))
        text.encode()
        return text
    except Exception as error:  # the template is the model's own program; half a surrogate pair is no text
        raise InvalidRequest(f"messages: the model's chat template refuses them: {error}") from None


def _token_logprob(text: str, data: bytes | None, logprob: float) -> dict[str, Any]:
    known = data if data else None if REPLACEMENT in text else text.encode()
    return {"token": text, "logprob": finite(logprob), "bytes": None if known is None else list(known)}
