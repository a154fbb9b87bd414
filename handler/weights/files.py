"""Which files of a checkpoint folder hold its weights."""

import json
from pathlib import Path

from handler.errors import CheckpointError

# Where transformers looks for weights in a folder; the first one that is there wins.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def weight_files(folder: Path) -> list[Path]:
    """The files in a checkpoint folder that transformers would load the weights from, in the index's order of names.

    Raises CheckpointError when there are none, or one that the index names is missing.
    """
    choices = (*_named_in_config(folder), *WEIGHTS)
    first = next((folder / name for name in choices if (folder / name).is_file()), None)
    if first is None:
        raise CheckpointError(f"{folder} holds no weights ({', '.join(WEIGHTS)}): download the checkpoint again")
    if first.suffix != ".json":
        return [first]
    try:
        names = sorted(set(json.loads(first.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{first} is not an index of shards: download it again") from None
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{first} names {file.name}, which is not beside it: download it again")
    return files


def _named_in_config(folder: Path) -> list[str]:
    """The file that config.json names under transformers' key for it, if it does."""
    try:
        name = json.loads((folder / "config.json").read_text()).get("transformers_weights")
    except (OSError, ValueError, AttributeError):
        return []
    return [name] if isinstance(name, str) else []
