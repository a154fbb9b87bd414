"""What int8 and int4 cost: perplexity and divergence from the 16-bit model on a real text, Python's own documentation.

python -m benchmarks.quality [--model-dir DIR]

Everything is computed in float32, so that only the weights' rounding counts. Without --model-dir it is the demo's
SmolLM2-135M-Instruct. That was once stored in 4 bits, in blocks of 32, and so flatters 4-bit formats.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel

from handler.loading import LoadedModel, load_model
from handler.settings import Settings
from scripts.demo_model import NAME, demo_model
from scripts.shard import shard

WINDOWS, LENGTH = 16, 512  # of tokens
SHARD_SIZE = 2 * 10**9


def windows(loaded: LoadedModel) -> torch.Tensor:
    """Token ids [WINDOWS, LENGTH]."""
    ids = loaded.tokenizer("\n\n".join(topics.values()), verbose=False)["input_ids"]
    return torch.tensor(ids[: WINDOWS * LENGTH]).view(WINDOWS, LENGTH)


@torch.inference_mode()
def log_probabilities(model: PreTrainedModel, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """Of each window's next tokens: [LENGTH - 1, vocab]."""
    for window in ids:
        yield model(window[None]).logits[0, :-1].float().log_softmax(-1)


def compare(reference: PreTrainedModel, model: PreTrainedModel, ids: torch.Tensor) -> dict[str, float]:
    """Perplexity of `model`, and by how much that is above `reference`'s; mean divergence from `reference` in nats a
    token; share of the positions where both find the same token likeliest."""
    loss = reference_loss = divergence = same = 0.0
    pairs = zip(log_probabilities(reference, ids), log_probabilities(model, ids), strict=True)
    for window, (expected, given) in zip(ids, pairs, strict=True):
        loss += cross_entropy(given, window[1:]).item() / len(ids)
        reference_loss += cross_entropy(expected, window[1:]).item() / len(ids)
        divergence += kl_div(given, expected, log_target=True, reduction="batchmean").item() / len(ids)
        same += (given.argmax(-1) == expected.argmax(-1)).double().mean().item() / len(ids)
    return {
        "perplexity": math.exp(loss),
        "perplexity_change_percent": 100 * math.expm1(loss - reference_loss),
        "divergence": divergence,
        "same_token": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="quality", description=__doc__)
    parser.add_argument("--model-dir", type=Path)
    model_dir = parser.parse_args().model_dir or demo_model(Path("models") / NAME)
    with tempfile.TemporaryDirectory(prefix="quality-") as scratch:
        work = Path(scratch)

        def load(folder: Path) -> LoadedModel:
            return load_model(folder, Settings(dtype="float32"), work)

        reference = load(model_dir)
        ids = windows(reference)
        report = {}
        for kind in ("int8", "int4"):
            print(shard(model_dir, work / kind, SHARD_SIZE, "keep", kind))
            report[kind] = compare(reference.model, load(work / kind).model, ids)
            report[kind]["bytes"] = sum(path.stat().st_size for path in (work / kind).glob("*.safetensors"))
    print(json.dumps({"model": model_dir.name, "tokens": ids.numel(), **report}, indent=2))


if __name__ == "__main__":
    main()
