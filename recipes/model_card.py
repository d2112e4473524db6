"""The exported model's card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_convert.hf import licence
from recipes.manifest import Manifest, write_text_atomically

if TYPE_CHECKING:
    from recipes.export_hf import Config

CARD = """\
---
license: {licence}
base_model: {teacher}
library_name: transformers
pipeline_tag: text-generation
---

# {name}

{parameters:.1f} M parameters, made from `{teacher}` with the recipe `{recipe}`: pruned with NVIDIA
ModelOpt's Minitron, then distilled from the unpruned model with NeMo.

| layers | hidden | feed-forward | heads | query groups | head size | vocabulary |
|---|---|---|---|---|---|---|
{shape}

Measured on {tokens:,} held-out tokens in windows of {window} ({windows} windows, no document in
common with training):

| | parameters | loss | perplexity | KL to teacher | top-1 agreement |
|---|---|---|---|---|---|
{rows}

{recovered}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

The licence is the base model's. Made with {versions}.
"""
SHAPE = (
    "| {num_layers} | {hidden_size} | {ffn_hidden_size} | {num_attention_heads} "
    "| {num_query_groups} | {kv_channels} | {vocab_size} |"
)
ROW = (
    "| {role} | {parameters:.1f} M | {loss:.3f} ± {error:.3f} | {perplexity:.1f} "
    "| {kl:.3f} | {agreement:.1%} |"
)


def write_card(folder: Path, cfg: Config, model: Manifest, evaluation: Manifest) -> None:
    """Replaces the teacher's card, which came along, by the student's own."""
    metrics: dict[str, Any] = evaluation.metrics
    roles = [role for role in ("teacher", "pruned", "distilled") if role in metrics]
    rows = "\n".join(_row(role, metrics[role]) for role in roles)
    share = metrics["recovered"]
    text = CARD.format(
        licence=licence(folder),
        teacher=cfg.teacher,
        recipe=cfg.recipe,
        name=f"{cfg.teacher.rstrip('/').split('/')[-1]}-{cfg.recipe}",
        parameters=(model.parameters or 0) / 1e6,
        shape=SHAPE.format(**(model.architecture or {})),
        rows=rows,
        tokens=metrics["tokens"],
        windows=metrics["windows"],
        window=metrics["tokens"] // metrics["windows"],
        recovered=""
        if share is None
        else f"Distillation took back {share:.0%} of the loss that pruning had added.",
        versions=", ".join(f"{k} {v}" for k, v in model.versions.items()),
    )
    write_text_atomically(folder / "README.md", text)


def _row(role: str, figures: dict[str, float]) -> str:
    return ROW.format(
        role=role,
        parameters=figures["parameters"] / 1e6,
        loss=figures["loss"],
        error=figures["loss_standard_error"],
        perplexity=figures["perplexity"],
        kl=figures["kl_to_teacher"],
        agreement=figures["top1_agreement"],
    )
