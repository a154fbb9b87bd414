"""OpenAI's completions and chat completions, streaming or not, with the parameters that vLLM adds."""

from handler.protocols.openai.call import ModelsCall, OpenAICall
from handler.protocols.openai.chat import ChatCall
from handler.protocols.openai.completions import CompletionCall

__all__ = ["ChatCall", "CompletionCall", "ModelsCall", "OpenAICall"]
