"""A process of its own that compiles a grammar as the worker would, but for 256 tokens, one a byte.

python grammar_trial.py LIMITS SECONDS < GRAMMAR

It prints what is wrong with the grammar, or nothing. LIMITS: of LLParserLimits, as JSON. A signal ends it after SECONDS
of the processor's time.
"""

import json
import os
import resource
import signal
import sys

_MEMORY = 2**30  # bytes


class Bytes:
    """A tokenizer, as llguidance asks for one."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, [256]
    tokens = [*(bytes([byte]) for byte in range(256)), b"</s>"]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def main(limits: str, seconds: str) -> None:
    os.nice(10)  # the worker's own work goes first, also before this import
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

    tokenizer = LLTokenizer(TokenizerWrapper(Bytes()))
    parser_limits = LLParserLimits(**json.loads(limits))
    if sys.platform == "linux":  # macOS refuses it
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, float(seconds))  # ends the process
    matcher = LLMatcher(tokenizer, sys.stdin.read(), log_level=0, limits=parser_limits)
    matcher.compute_bitmask()
    print(matcher.get_error())


if __name__ == "__main__":
    main(*sys.argv[1:])
