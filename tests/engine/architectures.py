"""The table of models: what the engine runs as `generate` does, and what it refuses and why.

Configurations are tiny and have windows and borders that a few tokens cross. `python -m tests.engine.architectures`
writes docs/models.md.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from handler.engine.architecture import Architecture
from tests.models import DEVICE

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
VOCAB, EOS, CONTEXT, WINDOW, BORDER = 320, 0, 96, 8, 24

_SHAPE = {
    "vocab_size": VOCAB, "eos_token_id": EOS, "bos_token_id": 1, "pad_token_id": EOS,
    "max_position_embeddings": CONTEXT, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
_EXPERTS = {
    "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "shared_expert_intermediate_size": 32,
}  # fmt: skip
_SLIDING = {"sliding_window": WINDOW}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, **_SLIDING}
# Keys and values are made of a small latent vector, with heads of their own size.
_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 12, "head_dim": 8,
}  # fmt: skip
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": BORDER,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 5.0, 8.0],
}  # fmt: skip
# The last layers attend to the keys and values of earlier ones.
_SHARING = {
    "head_dim": 8, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8,
    "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, **_SLIDING,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "image_size": 28, "patch_size": 14,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Case:
    """A model_type as config.json has it, models known by it, and what its tiny configuration changes."""

    model_type: str
    known: str
    changes: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    def __str__(self) -> str:
        return f"{self.model_type}, {self.note}" if self.note else self.model_type

    def make_config(self) -> PreTrainedConfig:
        return AutoConfig.for_model(self.model_type, **_SHAPE | self.changes)

    def make_model(self) -> PreTrainedModel:
        """With float32 weights so large that no two words are nearly tied."""
        model = AutoModelForCausalLM.from_config(self.make_config())
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.3, generator=generator)
        return model.eval().to(DEVICE)


RUNS = [
    Case("afmoe", "Trinity", _EXPERTS | _MIXED),
    Case("apertus", "Apertus"),
    Case("arcee", "AFM-4.5B"),
    Case("aria_text", "Aria", _EXPERTS),
    Case("axk1", "A.X K1", _EXPERTS | _LATENT),
    Case("biogpt", "BioGPT"),
    Case("bitnet", "BitNet b1.58"),
    Case("bloom", "BLOOM, BLOOMZ"),
    Case("codegen", "CodeGen", {"rotary_dim": 4, "n_embd": 32, "n_head": 4, "n_positions": CONTEXT, "n_ctx": CONTEXT}),
    Case("cohere", "Command R"),
    Case("cohere2", "Command R7B, Command A", _MIXED),
    Case("cohere2_moe", "Command A with experts", _EXPERTS | _MIXED),
    Case("ctrl", "CTRL", {"n_positions": CONTEXT}),
    Case("cwm", "CWM", _MIXED),
    Case("deepseek_v2", "DeepSeek-V2, DeepSeek-Coder-V2", _EXPERTS | _LATENT),
    Case("deepseek_v3", "DeepSeek-V3, DeepSeek-R1, Kimi-K2", _EXPERTS | _LATENT),
    Case("diffllama", "DiffLlama"),
    Case("doge", "Doge"),
    Case("dots1", "dots.llm1", _EXPERTS | _MIXED),
    Case("ernie4_5", "ERNIE 4.5"),
    Case("ernie4_5_moe", "ERNIE 4.5 with experts", _EXPERTS | {"moe_k": 2}),
    Case("exaone4", "EXAONE 4.0", _MIXED),
    Case("exaone_moe", "K-EXAONE", _EXPERTS | _MIXED),
    Case("falcon", "Falcon-7B", {"alibi": False, "multi_query": True}),
    Case("falcon", "Falcon-40B, Falcon-180B", {"alibi": False, "new_decoder_architecture": True}, "grouped heads"),
    Case("falcon", "Falcon-RW", {"alibi": True, "multi_query": False}, "ALiBi"),
    Case("flex_olmo", "FlexOlmo", _EXPERTS),
    Case("gemma", "Gemma", {"head_dim": 8}),
    Case("gemma2", "Gemma 2", {"head_dim": 8, **_MIXED}),
    Case(
        "gemma3", "Gemma 3 4B and larger", {"text_config": _SHAPE | {"head_dim": 8, **_MIXED}, "vision_config": _VISION}
    ),
    Case("gemma3_text", "Gemma 3", {"head_dim": 8, **_MIXED}),
    Case("gemma3n_text", "Gemma 3n", _SHARING | {"activation_sparsity_pattern": None, "intermediate_size": 64}),
    Case("gemma4", "Gemma 4", {"text_config": _SHAPE | _SHARING, "vision_config": _VISION, "audio_config": None}),
    Case(
        "gemma4_text",
        "Gemma 4 26B-A4B, 31B",
        {"head_dim": 8, "global_head_dim": 16, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, **_MIXED},
        "no shared layers",
    ),
    Case("glm", "GLM-4-9B", {"head_dim": 8}),
    Case("glm4", "GLM-4-0414", {"head_dim": 8}),
    Case("glm4_moe", "GLM-4.5, GLM-4.6", {"head_dim": 8} | _EXPERTS),
    Case("glm4_moe_lite", "GLM-4.7-Flash", _EXPERTS | _LATENT),
    Case("gpt2", "GPT-2, DistilGPT2, Cerebras-GPT", {"n_positions": CONTEXT}),
    Case("gpt_bigcode", "StarCoder, SantaCoder", {"n_positions": CONTEXT}),
    Case(
        "gpt_neo",
        "GPT-Neo, TinyStories",
        {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    ),
    Case("gpt_neox", "Pythia, GPT-NeoX-20B, Dolly, RedPajama"),
    Case("gpt_oss", "gpt-oss", {"head_dim": 8} | _EXPERTS | _MIXED),
    Case("gptj", "GPT-J", {"rotary_dim": 4, "n_embd": 32, "n_head": 4, "n_positions": CONTEXT}),
    Case("granite", "Granite 3"),
    Case("granite_swa", "Granite with windows", _MIXED),
    Case("granitemoe", "Granite 3 with experts", _EXPERTS),
    Case("granitemoeshared", "Granite 4 tiny preview", _EXPERTS),
    Case("helium", "Helium", {"head_dim": 8}),
    Case("hunyuan_v1_dense", "Hunyuan dense", {"head_dim": 8}),
    Case("hunyuan_v1_moe", "Hunyuan-A13B", {"head_dim": 8, "moe_topk": 2} | _EXPERTS),
    Case("hy_v3", "Hunyuan 3", {"head_dim": 8, **_EXPERTS}),
    Case("hyperclovax", "HyperCLOVA X SEED"),
    Case("internlm3", "InternLM3", {"head_dim": 8}),
    Case("jais2", "Jais 2"),
    Case("jetmoe", "JetMoE", {"kv_channels": 8} | _EXPERTS),
    Case("laguna", "Laguna", {"head_dim": 8} | _EXPERTS | _MIXED),
    Case("llama", "Llama 1 to 3.3, Vicuna, Yi, TinyLlama, SmolLM2, Falcon 3, DeepSeek-R1-Distill-Llama"),
    Case(
        "llama",
        "Llama 3.1 and later",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        "scaled RoPE",
    ),
    Case(
        "llama", "", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}, "dynamic RoPE"
    ),
    Case("longcat_flash", "LongCat-Flash", _EXPERTS | _LATENT),
    Case("mellum", "Mellum 2", _EXPERTS),
    Case("mimo_v2_flash", "MiMo-V2-Flash", _EXPERTS | _MIXED),
    Case("minicpm3", "MiniCPM3", _LATENT),
    Case("minimax_m2", "MiniMax-M2", {"head_dim": 8} | _EXPERTS),
    Case("ministral", "Ministral-8B", {"head_dim": 8, **_MIXED}),
    Case(
        "ministral3",
        "Ministral 3",
        {
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "llama_4_scaling_beta": 0.5,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    Case("mistral", "Mistral 7B v0.2 and later, Mistral Nemo", {"sliding_window": None}),
    Case("mistral", "Mistral 7B v0.1", _SLIDING, "sliding"),
    Case("mixtral", "Mixtral", {"sliding_window": None} | _EXPERTS),
    Case("modernbert-decoder", "Ettin", {"local_attention": WINDOW} | _MIXED),
    Case("nanochat", "nanochat"),
    Case("nemotron", "Nemotron, Minitron"),
    Case("olmo", "OLMo"),
    Case("olmo2", "OLMo 2"),
    Case("olmo3", "Olmo 3", _MIXED),
    Case("olmoe", "OLMoE", _EXPERTS),
    Case("opt", "OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    Case("persimmon", "Persimmon"),
    Case("phi", "Phi-1, Phi-2"),
    Case("phi3", "Phi-3-mini-4k, Phi-4", _SLIDING),
    Case(
        "phi3",
        "Phi-3-mini-128k, Phi-3.5-mini, Phi-4-mini",
        {"rope_parameters": _LONGROPE, "original_max_position_embeddings": BORDER},
        "longrope",
    ),
    Case(
        "phimoe",
        "Phi-3.5-MoE",
        _EXPERTS
        | {
            "original_max_position_embeddings": BORDER,
            "rope_parameters": _LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.3},
        },
        "longrope",
    ),
    Case("qwen2", "Qwen1.5, Qwen2, Qwen2.5, QwQ, DeepSeek-R1-Distill-Qwen"),
    Case("qwen2", "", {"use_sliding_window": True, "max_window_layers": 2} | _SLIDING, "sliding"),
    Case("qwen2_moe", "Qwen1.5-MoE, Qwen2-57B-A14B", _EXPERTS),
    Case("qwen3", "Qwen3", {"head_dim": 8}),
    Case("qwen3_moe", "Qwen3-30B-A3B, Qwen3-235B-A22B", {"head_dim": 8} | _EXPERTS),
    Case("seed_oss", "Seed-OSS", {"head_dim": 8}),
    Case("smollm3", "SmolLM3", _MIXED),
    Case("solar_open", "Solar Open", {"head_dim": 8} | _EXPERTS),
    Case("stablelm", "StableLM"),
    Case("starcoder2", "StarCoder2", _SLIDING),
    Case("vaultgemma", "VaultGemma", {"head_dim": 8, **_MIXED}),
    Case("xglm", "XGLM", {"d_model": 32, "ffn_dim": 64, "attention_heads": 4, "num_layers": 4}),
    Case("youtu", "Youtu-LLM", _LATENT),
]

_STATE = "keeps more than keys and values of a decoder"
_OTHER_LAYERS = "has layers other than attention"
_NO_POSITIONS = "takes no position_ids: rows differ in length"
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}
_INDEXED = {"index_n_heads": 2, "index_head_dim": 8, **_EXPERTS, **_LATENT}

# What the engine says of each when it is made.
REFUSED = {
    Case("bamba", "Bamba", _MAMBA): _STATE,
    Case("bart", "BART"): _NO_POSITIONS,
    Case(
        "bert", "BERT, RoBERTa and others without `is_decoder`"
    ): "gives other logits when a prompt is cut into chunks",
    Case("cpmant", "CPM-Ant"): _NO_POSITIONS,
    Case("deepseek_v32", "DeepSeek-V3.2", _INDEXED): _OTHER_LAYERS,
    Case("falcon_h1", "Falcon-H1"): _STATE,
    Case("falcon_mamba", "Falcon Mamba"): _STATE,
    Case("glm_moe_dsa", "GLM-5", _INDEXED): _OTHER_LAYERS,
    Case("granitemoehybrid", "Granite 4", _MAMBA): _STATE,
    Case("jamba", "Jamba", _EXPERTS): _STATE,
    Case("lfm2", "LFM2", {"layer_types": ["conv", "full_attention"] * 2}): _OTHER_LAYERS,
    Case("llama4_text", "Llama 4", {"head_dim": 8, **_EXPERTS}): _OTHER_LAYERS,
    Case("mamba", "Mamba"): _STATE,
    Case("mamba2", "Mamba 2, Codestral Mamba", {"num_heads": 4, "head_dim": 16}): _STATE,
    Case("minimax", "MiniMax-Text-01", _EXPERTS): _OTHER_LAYERS,
    Case("mpt", "MPT", {"d_model": 32, "n_heads": 4, "n_layers": 2}): _NO_POSITIONS,
    Case("nemotron_h", "Nemotron-H, Nemotron 3", _EXPERTS): _STATE,
    Case("olmo_hybrid", "Olmo Hybrid"): _STATE,
    Case("openai-gpt", "GPT", {"n_positions": CONTEXT}): "cannot run rows of different length together",
    Case("qwen3_5_text", "Qwen3.5"): _STATE,
    Case("qwen3_next", "Qwen3-Next", _EXPERTS): _STATE,
    Case("recurrent_gemma", "RecurrentGemma"): _STATE,
    Case("roformer", "RoFormer", {"is_decoder": True}): _NO_POSITIONS,
    Case("rwkv", "RWKV-4"): _STATE,
    Case("xlstm", "xLSTM", {"num_heads": 4}): _STATE,
    Case("zamba", "Zamba"): _STATE,
}

_HEAD = """# Models

Written by `python -m tests.engine.architectures` from the table that the tests run.

## These run

Each as a tiny model with random float32 weights: prompts of different length, cut into chunks, that come and go, give
token for token what `model.generate` gives each alone. Windows and borders are tiny too, so that they are crossed.
"Sliding" layers attend to the last tokens only; a sequence may still be as long as the model allows.

| `model_type` | known as | layers |
|---|---|---|
"""
_LONGROPE_AND_REFUSED = """
**longrope** has factors for short sequences and others for long ones. Each row gets its own, and a sequence that grows
beyond the border is prefilled again once, as `generate` does.

## These are refused

The engine says so when it is made, before the worker is READY.

| `model_type` | known as | why |
|---|---|---|
"""
_TAIL = """
A model that is in neither table is tried: when the engine is made it runs a dozen tokens as one chunk and as two, in
rows of different length (two passes over the weights, and two more where none are on disk), and refuses a model whose
logits then differ by more than
rounding. So short a run cannot see what begins at many tokens, as a window does. In bfloat16 and float16 it overlooks
what changes logits by less than a fifth of their standard deviation.
"""


def make_page() -> str:
    """The text of docs/models.md."""
    runs = [f"| {_name(case)} | {case.known} | {_layers(case)} |\n" for case in RUNS]
    refused = [f"| {_name(case)} | {case.known} | {reason} |\n" for case, reason in REFUSED.items()]
    return "".join([_HEAD, *runs, _LONGROPE_AND_REFUSED, *refused, _TAIL])


def _name(case: Case) -> str:
    return f"`{case.model_type}`" + (f", {case.note}" if case.note else "")


def _layers(case: Case) -> str:
    config = case.make_config()
    with torch.device("meta"):
        window = Architecture.of(AutoModelForCausalLM.from_config(config)).sliding_window
    config = config.get_text_config()
    if window is None:
        return "full"
    types = getattr(config, "layer_types", getattr(config, "attention_layers", []))
    return "sliding and full" if len(set(types)) > 1 else "sliding"


if __name__ == "__main__":
    PAGE.write_text(make_page())
