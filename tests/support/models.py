"""Writes tiny Hugging Face models and tokenizers."""

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
"""A shape with tied embeddings, and sizes that are not multiples of 64. Two tensor-parallel ranks
cannot split the odd number of heads."""
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
"""A shape with untied embeddings and even sizes, which two tensor or pipeline ranks can split."""
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
"""Config fields of each family's tiny model, in addition to its shape, by ``model_type``."""


def write_tiny_model(
    folder: Path, text_file: Path, model_type: str = "llama", **fields: Any
) -> Path:
    """Saves a model, and a tokenizer with a chat template, both trained on the text.

    Args:
        folder: Folder to write.
        text_file: JSON lines with the key ``text``.
        model_type: A key of ``FAMILIES``.
        fields: Fields of the config, such as ``ODD`` or ``EVEN``. Three more keys are not in the
            config: ``dtype`` of the saved weights (default: float32), ``max_shard_size`` as in
            ``save_pretrained``, and ``train`` (``False`` leaves the weights random).

    Returns:
        ``folder``.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = _tokenizer(text_file)
    torch.manual_seed(0)
    dtype, train = fields.pop("dtype", torch.float32), fields.pop("train", True)
    max_shard_size = fields.pop("max_shard_size", "5GB")
    config = AutoConfig.for_model(
        model_type,
        vocab_size=fields.pop("vocab_size", 293),  # 5 rows more than the tokenizer has tokens
        max_position_embeddings=256,
        rope_theta=5000.0,  # not a default, so a conversion that loses it changes the logits
        initializer_range=0.05,
        **FAMILIES[model_type],
        **fields,
    )
    model = AutoModelForCausalLM.from_config(config)
    # Initially all biases are 0 and all norm weights are 1. If a conversion swapped two of them, no
    # test would notice it. Noise makes them different.
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    if train:
        _train(model, text_file)
    model = model.to(dtype)
    # Settings that are not defaults, and that a conversion must keep.
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return folder


def write_byte_fallback_tokenizer(text_file: Path, folder: Path) -> None:
    """Writes a tokenizer like Llama 2's.

    "▁" represents a space. A character without a token becomes one token for each of its bytes.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE())  # trained without byte tokens, which are added below
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=180, show_progress=False)
    plain.train_from_iterator(_texts(text_file), trainer)
    bpe_model = json.loads(plain.to_str())["model"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *bpe_model["vocab"]]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [tuple(merge) for merge in bpe_model["merges"]]
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    replace_spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace_spaces])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special_tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens).save_pretrained(folder)


@cache
def _tokenizer(text_file: Path) -> Any:
    """Returns a byte-level BPE tokenizer: 256 bytes, ``<eos>``, and 31 merges."""
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
    bpe.train_from_iterator(_texts(text_file), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}"
    return tokenizer


def _texts(text_file: Path) -> list[str]:
    """Returns the value of ``text`` in each JSON line."""
    return [json.loads(line)["text"] for line in text_file.read_text().splitlines()]


@cache
def _sequences(text_file: Path) -> Any:
    """Returns the token ids of all texts, [sequences, 64]. Drops an incomplete last one."""
    import torch

    tokenizer = _tokenizer(text_file)
    ids = [token for text in _texts(text_file) for token in tokenizer(text)["input_ids"]]
    num_sequences = len(ids) // 64
    return torch.tensor(ids[: 64 * num_sequences]).view(num_sequences, 64)


def _train(model: Any, text_file: Path) -> None:
    """Trains a model for a few steps.

    Distillation refuses a teacher whose loss is not better than chance.
    """
    import torch

    sequences = _sequences(text_file)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        batch = sequences[torch.randint(len(sequences), (8,))]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
