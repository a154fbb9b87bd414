"""The bodies of OpenAI's requests, and what they ask of the engine."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, Tag, model_validator

from handler.engine import Grammar, Request
from handler.engine.sampling_params import MOST_TOKEN_IDS
from handler.protocols.base import Strict, text_or

Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(gt=-(2**63), lt=2**63)]


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: usage so far in every chunk
    include_obfuscation: bool = False


Text = Annotated[str, Tag("text")]
StopStrings = Annotated[list[str], Field(fail_fast=True), Tag("other")]


def _few(bias: Any) -> Any:
    """Before each is looked at: pydantic makes an error of every one that is wrong."""
    if isinstance(bias, dict) and len(bias) > MOST_TOKEN_IDS:
        raise ValueError(f"send at most {MOST_TOKEN_IDS} token ids")
    return bias


def _schema_text(schema: Any) -> str:
    """Raises ValueError unless it is a JSON schema, or the text of one. Nulls stay: they mean something there."""
    if isinstance(schema, str):
        return schema
    if not isinstance(schema, dict):
        raise ValueError("send a JSON schema, as an object or as text")
    try:
        return json.dumps(schema, allow_nan=False)
    except RecursionError:
        raise ValueError("the schema is nested too deeply") from None


Schema = Annotated[str, BeforeValidator(_schema_text)]
Choices = Annotated[list[str], Field(fail_fast=True, max_length=1000)]


class JSONSchema(Strict):
    name: str
    description: str | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None  # the schema is always kept


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> "ResponseFormat":
        if (self.type == "json_schema") != bool(self.json_schema):
            raise ValueError('send json_schema with type "json_schema", and with no other')
        return self


class StructuredOutputs(Strict):
    """vLLM's newer form of its guided_ fields."""

    json_: Schema | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _check(self) -> "StructuredOutputs":
        if len(self.model_fields_set) != 1:
            raise ValueError("send one of json, regex, choice and json_object: true")
        return self


class Generation(Strict):
    """The fields that both have. Those of the last group change nothing in an answer and are taken as they come."""

    model: str | None = None
    temperature: Annotated[Number, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Annotated[Text | StopStrings, text_or(list)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    # JSON's names are text, so the ids are.
    logit_bias: (
        Annotated[
            dict[Annotated[int, Field(strict=False)], Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_few)
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    response_format: ResponseFormat | None = None
    # vLLM's
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    structured_outputs: StructuredOutputs | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**63)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0)] | None = None
    # without influence
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @model_validator(mode="after")
    def _check(self) -> "Generation":
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is only for stream: true")
        if self.max_tokens and self.max_tokens < (self.min_tokens or 0):
            raise ValueError("min_tokens is more than max_tokens")
        if len(grammars := self.grammars()) > 1:
            raise ValueError(f"{' and '.join(grammar.field for grammar in grammars)} exclude each other; send one")
        return self

    def grammars(self) -> list[Grammar]:
        """What the answer must be, for each field that says it."""
        form, outputs = self.response_format, self.structured_outputs or StructuredOutputs.model_construct()
        schema = form.json_schema.schema_ if form and form.json_schema else None
        is_object = form is not None and form.type == "json_object"
        fields: list[tuple[Literal["json_object", "json_schema", "regex", "choice"], str | None, str]] = [
            ("json_schema", schema, "response_format"),
            ("json_object", "" if is_object else None, "response_format"),
            ("json_schema", self.guided_json, "guided_json"),
            ("regex", self.guided_regex, "guided_regex"),
            ("choice", _choices_text(self.guided_choice), "guided_choice"),
            ("json_schema", outputs.json_, "structured_outputs"),
            ("json_object", "" if outputs.json_object else None, "structured_outputs"),
            ("regex", outputs.regex, "structured_outputs"),
            ("choice", _choices_text(outputs.choice), "structured_outputs"),
        ]
        return [Grammar(kind, text, field) for kind, text, field in fields if text is not None]

    def parameters(self) -> dict[str, Any]:
        """Those that are specified, under the names of transformers' GenerationConfig."""
        sampled = any((self.temperature, self.top_p, self.min_p, self.top_k and self.top_k > 0))
        params = {
            "max_new_tokens": self.max_tokens or None,
            "temperature": self.temperature,
            "top_p": self.top_p,
            # Off unless asked for: in transformers sampling alone would bring a top_k of 50.
            "top_k": max(self.top_k or 0, 0) if sampled else None,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "min_new_tokens": self.min_tokens,
        }
        return {name: value for name, value in params.items() if value is not None}

    def request(self, prompt: str | list[int], logprobs: int | None, prompt_logprobs: bool = False) -> Request:
        """What the engine is asked for one prompt."""
        return Request(
            prompt,
            self.parameters(),
            n=self.n or 1,
            seed=self.seed,
            stop=self.stop or (),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            ignore_eos=bool(self.ignore_eos),
            grammar=next(iter(self.grammars()), None),
            logit_bias=self.logit_bias,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            cache_salt=self.cache_salt,
        )


def _choices_text(choices: list[str] | None) -> str | None:
    return None if choices is None else json.dumps(choices)


def _are_token_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(token_id) is int for token_id in prompt)


def _prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts one by one. A list of numbers is one prompt of token ids."""
    prompts = prompt if isinstance(prompt, list) and not _are_token_ids(prompt) else [prompt]
    if not prompts or not all(isinstance(one, str) or _are_token_ids(one) for one in prompts):
        raise ValueError("send a string, token ids, or a list of these, and nothing empty but a string")
    return prompts


class Completion(Generation):
    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> "Completion":
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of is not supported; ask for n")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1, or 0 with echo")
        return self


class TextPart(Strict):
    type: Literal["text"]
    text: str


TextParts = Annotated[list[TextPart], Field(fail_fast=True, max_length=1024), Tag("other")]


def _arguments(text: str) -> str:
    """Raises ValueError unless it is a JSON object: templates write it out as one."""
    try:
        is_object = isinstance(json.loads(text), dict)
    except ValueError:
        is_object = False
    if not is_object:
        raise ValueError("send a JSON object, as text")
    return text


class CalledFunction(Strict):
    name: str
    arguments: Annotated[str, AfterValidator(_arguments)]


class ToolCall(Strict):
    index: Any = None  # without influence: OpenAI's client leaves it there when it puts a stream together
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments)}
        return {"type": self.type, "function": function} | ({"id": self.id} if self.id else {})


def _empty(value: Any) -> None:
    if value:
        raise ValueError("this field is only accepted when it is empty, as OpenAI's client sends it back")


# Fields of an answer that come back in the next request: nothing here makes them, and no template can use them.
Unused = Annotated[Any, AfterValidator(_empty)]


class Message(Strict):
    role: str
    content: Annotated[Text | TextParts, text_or(list)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=128)] = []
    tool_call_id: str | None = None
    refusal: Unused = None
    annotations: Unused = None
    audio: Unused = None
    function_call: Unused = None

    def for_template(self) -> dict[str, Any]:
        """The message with its parts joined, as chat templates expect it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])
        message = {
            "name": self.name,
            "tool_calls": [call.for_template() for call in self.tool_calls],
            "tool_call_id": self.tool_call_id,
        }
        return {"role": self.role, "content": text} | {name: value for name, value in message.items() if value}


class Function(Strict):
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] = {}
    strict: Any = None  # without influence


class Tool(Strict):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        return self.model_dump(exclude={"function": {"strict"}}, exclude_none=True)


class Chat(Generation):
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=128)] = []
    tool_choice: Literal["none", "auto"] = "auto"
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _check_chat(self) -> "Chat":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_completion_tokens and self.max_tokens not in (None, self.max_completion_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ; send one")
        if (self.max_completion_tokens or self.max_tokens or 2**63) < (self.min_tokens or 0):
            raise ValueError("min_tokens is more than max_completion_tokens")
        if self.max_tokens == 0:
            raise ValueError("max_tokens must be at least 1")
        if self.offered_tools() and (grammars := self.grammars()):
            raise ValueError(f'tools and {grammars[0].field} exclude each other; send one, or tool_choice "none"')
        return self

    def parameters(self) -> dict[str, Any]:
        own = {"max_new_tokens": self.max_completion_tokens} if self.max_completion_tokens else {}
        return super().parameters() | own

    def offered_tools(self) -> list[Tool]:
        """The tools that the model may call."""
        return self.tools if self.tool_choice == "auto" else []
