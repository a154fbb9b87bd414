"""Small real models for tests and benchmarks: a tokenizer trained here, weights drawn here."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # that models compute on

CORPUS = [
    "My dog is cute and my cat is not.",
    "The quick brown fox jumps over the lazy dog, again and again.",
    "Große Füße, naïve café, 東京の犬はかわいい, emoji 🐶🐱 and more.",
    '{"instances": ["My dog is cute"], "parameters": {"max_new_tokens": 8}}',
]


SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def train_tokenizer(
    vocab_size: int = 384, corpus: Sequence[str] = CORPUS, special_tokens: Mapping[str, str] = SPECIAL_TOKENS
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, as BLOOM's is: any text survives the round trip, and most characters outside ASCII
    take several tokens. The special tokens have the first ids, in their order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


@functools.cache
def make_sentencepiece():
    """As Llama's: "▁" for a space, the first of which is dropped, and bytes for unknown characters."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *[f"<0x{b:02X}>" for b in range(256)],
        "▁",
        *"abcdehlowrd.",
        "▁a",
        "▁b",
        "lo",
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁", "b"), ("l", "o")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")


def sharpen(model: PreTrainedModel) -> PreTrainedModel:
    """Draw larger weights, so that no two tokens are nearly tied and greedy decoding is exact in any batch."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def save_tiny_bloom(folder: Path, shards: bool = True, **config) -> Path:
    """A BLOOM of 4 layers and about 90,000 weights, in several shards, with its tokenizer. Returns `folder`."""
    tokenizer = train_tokenizer()
    shape = {"hidden_size": 32, "n_layer": 4, "n_head": 4, **config}
    model = sharpen(BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), **shape, pad_token_id=3)))
    model.save_pretrained(folder, max_shard_size="130KB" if shards else "1GB")
    tokenizer.save_pretrained(folder)
    return folder


def save_bloom_7b1_config(folder: Path) -> Path:
    """The config.json of bigscience/bloom-7b1, and nothing else, in `folder`; `folder`."""
    shape = {"vocab_size": 250880, "hidden_size": 4096, "n_layer": 30, "n_head": 32, "seq_length": 2048}
    BloomConfig(**shape, dtype="float16", architectures=["BloomForCausalLM"]).save_pretrained(folder)
    return folder


SAMPLE_SETUP_CONFIG = {  # as every copy of the well-known sample has it
    "revision": "main",
    "max_memory": {"0": "10GB", "cpu": "10GB"},
    "low_cpu_mem_usage": True,
    "device_map": "auto",
    "offload_folder": "offload",
    "offload_state_dict": True,
    "torch_dtype": "float16",
    "max_length": "80",
}
