"""Writes tiny models."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

ODD = {
    "hidden_size": 56,
    "intermediate_size": 120,
    "num_hidden_layers": 5,
    "num_attention_heads": 7,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "tie_word_embeddings": True,
}
"""Tied embeddings, and sizes that are not multiples of 64. Two ranks cannot split 7 heads."""
EVEN = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 294,
    "tie_word_embeddings": False,
}
"""Untied embeddings, and sizes that two tensor-parallel or pipeline ranks can split."""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
    },
}
"""Settings of each family's tiny model, in addition to its shape, by ``model_type``."""


def write_tiny_model(
    folder: Path, text_file: Path, model_type: str = "llama", **fields: Any
) -> Path:
    """Saves a model, and a tokenizer with a chat template, both trained on the text.

    ``fields`` are fields of the config, and ``dtype``, ``max_shard_size`` and ``train``.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = _tokenizer(text_file)
    torch.manual_seed(0)
    dtype, train = fields.pop("dtype", torch.float32), fields.pop("train", True)
    shard = fields.pop("max_shard_size", "5GB")
    config = AutoConfig.for_model(
        model_type,
        vocab_size=fields.pop("vocab_size", 293),  # the tokenizer has 288 tokens
        max_position_embeddings=256,
        rope_theta=5000.0,
        initializer_range=0.05,
        **FAMILIES[model_type],
        **fields,
    )
    model = AutoModelForCausalLM.from_config(config)
    # If a conversion swapped two biases that are all 0, or two norms that are all 1, no test would
    # notice it. So they become random.
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    if train:
        _train(model, text_file)
    model = model.to(dtype)
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return folder


def write_byte_fallback_tokenizer(text_file: Path, folder: Path) -> None:
    """Writes a tokenizer like Llama 2's: "▁" is a space; unknown characters become byte tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=180, show_progress=False)
    trained.train_from_iterator(_lines(text_file), trainer)
    bpe_model = json.loads(trained.to_str())["model"]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: n for n, token in enumerate([*special, *bpe_model["vocab"]])}
    merges = [tuple(merge) for merge in bpe_model["merges"]]
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


@cache
def _tokenizer(text_file: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=288,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(_lines(text_file), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}"
    return tokenizer


def _lines(text_file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in text_file.read_text().splitlines()]


@cache
def _sequences(text_file: Path) -> Any:
    """Returns the token ids of the text, [sequences, 64]."""
    import torch

    tokenizer = _tokenizer(text_file)
    ids = [i for line in _lines(text_file) for i in tokenizer(line)["input_ids"]]
    return torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)


def _train(model: Any, text_file: Path) -> None:
    """Trains a few steps, because distillation refuses a teacher whose loss is near chance."""
    import torch

    sequences = _sequences(text_file)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        batch = sequences[torch.randint(len(sequences), (8,))]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
