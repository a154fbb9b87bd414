"""A process that tries grammars: each in a fork of its own, which compiles it as the worker would, but for 256 tokens,
one a byte. To start Python for each would take ten times as long as most grammars do.

python grammar_trial.py LIMITS

LIMITS: of LLParserLimits, as JSON. It reads lines of JSON, [grammar, seconds of the processor's time], until its input
ends. Each is answered by a line: what is wrong with the grammar, as a string, empty for nothing; or, as a number, how
the fork ended without a word, as subprocess has it: -SIGPROF by the time that it may use, -SIGALRM by the clock.
"""

import json
import os
import resource
import signal
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

_MEMORY = 2**30  # bytes
# Seconds by the clock. With its low priority it gets a twentieth of the time of cores that are busy.
_TIMEOUT = 60.0


class Bytes:
    """A tokenizer, as llguidance asks for one."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, [256]
    tokens = [*(bytes([byte]) for byte in range(256)), b"</s>"]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def main(limits: str) -> None:
    os.nice(10)  # the worker's own work goes first
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizer, parser_limits = LLTokenizer(TokenizerWrapper(Bytes())), LLParserLimits(**json.loads(limits))
    for line in sys.stdin:
        grammar, seconds = json.loads(line)
        reader, writer = os.pipe()
        if fork := os.fork():
            os.close(writer)
            with open(reader) as pipe:
                answer = pipe.read()
            _, status = os.waitpid(fork, 0)
            print(os.waitstatus_to_exitcode(status) or answer, flush=True)
        else:
            answer = json.dumps(_compile(tokenizer, parser_limits, grammar, seconds))
            with open(writer, "w") as pipe:
                pipe.write(answer)
            os._exit(0)


def _compile(tokenizer: LLTokenizer, limits: LLParserLimits, grammar: str, seconds: float) -> str:
    if sys.platform == "linux":  # macOS refuses it
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    signal.setitimer(signal.ITIMER_REAL, _TIMEOUT)  # these end the process
    signal.setitimer(signal.ITIMER_PROF, seconds)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    matcher.compute_bitmask()
    return matcher.get_error()


if __name__ == "__main__":
    main(sys.argv[1])
