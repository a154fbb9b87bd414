"""What the benchmarks share: BLOOM-560m's exact shape with random weights, 1.1 GB in bfloat16."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BloomConfig

from tests.models import train_tokenizer

WORK = Path(".run/bench")  # of every benchmark


def bloom_560m(folder: Path, shard_size: str = "100MB") -> Path:
    """Write the checkpoint to `folder` unless it is there; `folder`. Its embedding is a shard of 514 MB by itself."""
    if not (folder / "model.safetensors.index.json").is_file():
        torch.manual_seed(0)
        config = BloomConfig(vocab_size=250880, hidden_size=1024, n_layer=24, n_head=16, pad_token_id=3)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder, max_shard_size=shard_size)
        train_tokenizer().save_pretrained(folder)
    return folder
