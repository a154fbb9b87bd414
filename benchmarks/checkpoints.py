"""What the benchmarks share: BLOOM's exact shapes with random weights, 560m (1.1 GB in bfloat16) and 7b1 (14.1 GB)."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, BloomConfig

from tests.models import DEVICE, train_tokenizer

WORK = Path(".run/bench")  # of every benchmark


def bloom_560m(folder: Path, shard_size: str = "100MB") -> Path:
    """Write the checkpoint to `folder` unless it is there; `folder`. Its embedding is a shard of 514 MB by itself."""
    if not (folder / "model.safetensors.index.json").is_file():
        torch.manual_seed(0)
        config = BloomConfig(vocab_size=250880, hidden_size=1024, n_layer=24, n_head=16, pad_token_id=3)
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder, max_shard_size=shard_size)
        train_tokenizer().save_pretrained(folder)
    return folder


def bloom_7b1(folder: Path) -> Path:
    """Write the checkpoint to `folder` unless it is there, a layer and a file at a time; `folder`."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(DEVICE).manual_seed(0)
    config = BloomConfig(vocab_size=250880, hidden_size=4096, n_layer=30, n_head=32, pad_token_id=3)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    files: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        files.setdefault(name.rpartition(".h.")[2].split(".")[0], []).append(name)
    weight_map = {}
    for number, names in enumerate(tqdm(files.values(), desc="BLOOM-7b1's shape", unit="file"), start=1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        shapes = {name: model.get_parameter(name).shape for name in names}
        tensors = {
            # Norms are ones, as a model's own are about; with random ones nothing but noise would come of it.
            name: torch.ones(shape)
            if "norm" in name or "ln_f" in name
            else torch.randn(shape, generator=generator, device=DEVICE) / 50
            for name, shape in shapes.items()
        }
        save_file({name: tensor.bfloat16().cpu() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
    config.save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
