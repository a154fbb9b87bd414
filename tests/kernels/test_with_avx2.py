"""What a CPU with AVX2 alone does, on one with AVX512. Its vectors are shorter: the heads of the tests' models are
whole ones of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from handler.kernels.cpu import lanes

ROOT = Path(__file__).parents[2]
# Of all models: with biases of attention, with heads of many sizes, with rotary embeddings of all kinds.
MODELS = "bloom or cohere or falcon or gemma2 or glm or gpt or llama or phi"
FILES = ("kernels", "engine/test_architectures.py", "engine/test_block_attention.py", "engine/test_bloom.py")
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.mark.skipif(lanes() != 16, reason="this CPU has no longer vectors")
def test_the_same_tests_pass():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        "-k",
        # Replayed steps are made of the same calls.
        f"not (test_replayed_steps or refused or test_the_page) and (not test_runs_as_generate_does or {MODELS})",
        *(f"tests/{f}" for f in FILES),
    ]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | AVX2, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-4000:]
