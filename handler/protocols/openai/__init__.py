"""OpenAI's completions and chat completions, streaming or not, with the parameters that vLLM adds."""

from handler.protocols.openai.call import OpenAICall
from handler.protocols.openai.chat import ChatCall
from handler.protocols.openai.completions import CompletionCall
from handler.protocols.openai.models import list_models

__all__ = ["ChatCall", "CompletionCall", "OpenAICall", "list_models"]
