"""OpenAI's completions and chat completions, streaming or not, with the parameters that vLLM adds."""

from handler.protocols.openai.calls import ChatCall, CompletionCall, OpenAICall, models

__all__ = ["ChatCall", "CompletionCall", "OpenAICall", "models"]
