import json

import pytest

from handler.errors import CheckpointError
from handler.weights.files import weight_files


def fill(folder, *names, index=(), **config):
    for name in names:
        (folder / name).touch()
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(enumerate(index))}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "names, index, config, expected",
    [
        (["model.safetensors", "pytorch_model.bin"], (), {}, ["model.safetensors"]),
        (["pytorch_model.bin"], (), {}, ["pytorch_model.bin"]),
        (["b", "a"], ("b", "a", "b"), {}, ["a", "b"]),
        (["other.safetensors"], (), {"transformers_weights": "other.safetensors"}, ["other.safetensors"]),
        (["model.safetensors"], (), {"transformers_weights": "gone.safetensors"}, ["model.safetensors"]),
    ],
)
def test_what_transformers_would_load(tmp_path, names, index, config, expected):
    assert [path.name for path in weight_files(fill(tmp_path, *names, index=index, **config))] == expected


def test_a_shard_that_is_missing_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"index\.json names b, which is not beside it"):
        weight_files(fill(tmp_path, "a", index=("a", "b")))


def test_no_weights(tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights"):
        weight_files(fill(tmp_path, "weights.pt"))


def test_an_index_that_is_none(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not an index of shards"):
        weight_files(tmp_path)
