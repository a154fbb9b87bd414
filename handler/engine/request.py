"""What a caller hands in."""

import uuid
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Grammar:
    """What a continuation must be, from its first character to its last.

    kind: "json_object" for any JSON object, or what `text` is: a JSON schema, a regular expression, or a JSON list of
        the strings to choose from.
    field: what the caller calls it; errors begin with this name.
    """

    kind: Literal["json_object", "json_schema", "regex", "choice"]
    text: str = ""
    field: str = "grammar"


@dataclass
class Request:
    """One prompt and how to continue it.

    prompt: text, or token ids. An empty prompt starts from the tokenizer's bos token.
    add_special_tokens: whether the tokenizer adds its own to a text, as bos; a chat template has written them already.
    parameters: transformers' `GenerationConfig` names, and `seed`.
    n: how many continuations; the i-th is seeded with seed + i.
    stop: strings that end a continuation, besides `parameters["stop_strings"]`. They are searched in the
        generated text only, and neither they nor what follows them appears in `Sequence.text`.
    logprobs: None, or how many most likely tokens to report beside each chosen one (0: the chosen one only).
    prompt_logprobs: also report the prompt's tokens, in `Job.prompt_logprobs`.
    eos_token_ids: tokens that end a continuation besides the model's own.
    ignore_eos: go on to the length limit whatever the model says.
    grammar: what each continuation must be. One that ends with "stop" is whole, one that ends with "length" may not be.
    logit_bias, presence_penalty, frequency_penalty: as OpenAI defines them, over generated tokens.
    cache_salt: keys and values of a prompt's beginning are shared with those alone who send the same.
    group: the same for prompts that came together; rows are shared fairly among groups. By default its own id.
    """

    prompt: str | list[int]
    parameters: dict[str, Any] = field(default_factory=dict)
    n: int = 1
    seed: int | None = None
    stop: str | tuple[str, ...] | list[str] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    grammar: Grammar | None = None
    logit_bias: dict[int, float] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    add_special_tokens: bool = True
    cache_salt: str | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    group: str | None = None
