"""Which of the models' functions are replaced, and when the models' own still run."""

import importlib

import pytest
import torch
from torch import nn

from handler.engine import rotation
from handler.engine.rotation import mend_rotation
from handler.kernels.cpu import lanes
from handler.kernels.rotation import rotate

pytestmark = pytest.mark.skipif(not lanes(), reason="this CPU has no code of ours")


def model_of(monkeypatch, name):
    """A model of that file, whose function is given back after the test."""
    file = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    theirs = getattr(file.apply_rotary_pos_emb, "_theirs", file.apply_rotary_pos_emb)
    monkeypatch.setattr(file, "apply_rotary_pos_emb", theirs)
    return file, type("Attention", (nn.Module,), {"__module__": file.__name__})()


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "olmo2", "gemma2"])
def test_what_the_library_usually_does_is_replaced_once(monkeypatch, name):
    file, model = model_of(monkeypatch, name)
    theirs = file.apply_rotary_pos_emb
    assert mend_rotation(nn.Sequential(model, model)) == 1
    ours = file.apply_rotary_pos_emb
    assert ours is not theirs and mend_rotation(model) == 0 and file.apply_rotary_pos_emb is ours


@pytest.mark.parametrize(
    "name",
    [
        "cohere",  # rounds once
        "gpt_neox",  # takes a part of each head: equal where that is all of it
        "glm",  # interleaves
        "gemma4",  # one tensor at a time
    ],
)
def test_what_else_has_its_name(monkeypatch, name):
    _, model = model_of(monkeypatch, name)
    assert mend_rotation(model) == (name == "gpt_neox")


def test_files_without_one():
    assert mend_rotation(nn.Linear(1, 1)) == 0
    assert mend_rotation(type("Attention", (nn.Module,), {"__module__": "of.nobody"})()) == 0


def given(size=64):
    torch.manual_seed(0)
    angles = torch.rand(2, 4, size) * 6
    return torch.randn(2, 3, 4, size), torch.randn(2, 1, 4, size), angles.cos(), angles.sin()


def test_it_does_what_the_models_function_does(monkeypatch):
    file, model = model_of(monkeypatch, "gpt_neox")
    theirs = file.apply_rotary_pos_emb
    mend_rotation(model)
    rotated = []
    monkeypatch.setattr(rotation, "rotate", lambda *case: rotated.append(case) or rotate(*case))
    query, key, cos, sin = given()
    square = query[:, :, :3], query[:, :, :3], cos[:, :3], sin[:, :3]  # either order of heads and tokens
    with torch.no_grad():
        for case, options, is_ours in (
            ((query, key, cos, sin), {}, True),
            ((query, key, cos[..., :16], sin[..., :16]), {}, False),
            (square, {"unsqueeze_dim": 2}, False),
            ((*square, 2), {}, False),
        ):
            rotated.clear()
            outputs = file.apply_rotary_pos_emb(*case, **options)
            assert all(map(torch.equal, outputs, theirs(*case, **options))) and bool(rotated) == is_ours


def test_gradients_are_the_models_own(monkeypatch):
    file, model = model_of(monkeypatch, "llama")
    mend_rotation(model)
    query, key, cos, sin = given()
    file.apply_rotary_pos_emb(query.requires_grad_(), key, cos, sin)[0].sum().backward()
    assert query.grad.abs().sum() > 0
