"""The exported model's card: what it is, what was measured, and code that runs as it stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_convert.hf import licence
from recipes.core.files import write_text_atomically
from recipes.core.manifest import Manifest

CARD = """\
---
license: {licence}
base_model: {teacher}
library_name: transformers
pipeline_tag: text-generation
tags: [pruned, distilled]
---

# {name}

{parameters:.1f} M parameters, made from `{teacher}` with the recipe `{recipe}`: pruned with NVIDIA
ModelOpt's Minitron, then distilled from the unpruned model with NeMo.

## Use

```python
{code}
```

## Shape

| | layers | hidden | feed-forward | heads | query groups | head size | vocabulary | parameters |
|---|---|---|---|---|---|---|---|---|
{shapes}

{made}

## Quality

Measured in float32 on {tokens:,} held-out tokens in windows of {window} ({windows} windows, no
document in common with training); ± is the standard error over windows:

| | parameters | loss | perplexity | KL to teacher | top-1 agreement |
|---|---|---|---|---|---|
{rows}
{recovered}{tasks}
## Limits

{limits}

The licence is the base model's{licence_note}. Made with {versions}.
"""
CODE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this folder, or where it was published
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
text = "The capital of France is"
inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))"""
LIMITS = """\
- It keeps the base model's biases and errors, and adds its own: distillation brings back little of
  what its text did not hold. Test it on what you need before you rely on it.
- The figures are of one run and one seed. A small loss in perplexity can hide a larger one in a
  task.
- Quality was measured in float32; a quantized engine's own may be lower. Speed depends on the
  engine and machine and is in the run's report, not here."""
SHAPE = (
    "| {role} | {num_layers} | {hidden_size} | {ffn_hidden_size} | {num_attention_heads} "
    "| {num_query_groups} | {kv_channels} | {vocab_size} | {parameters:,} |"
)
ROW = (
    "| {role} | {parameters:.1f} M | {loss:.3f} ± {error:.3f} | {perplexity:.1f} "
    "| {kl:.3f} | {agreement:.1%} |"
)
ROLES = ("teacher", "pruned", "distilled")


def write_card(folder: Path, teacher: str, recipe: str, inputs: Mapping[str, Manifest]) -> None:
    """Replaces the teacher's card, which came along, by the student's own.

    Args:
        folder: The exported folder, with the teacher's card.
        teacher: Model that the student came from.
        recipe: What was done.
        inputs: Manifests of the stage's inputs by name; optional ones add what they know.
    """
    model, metrics = inputs["checkpoint"], inputs["evaluation"].metrics
    share, terms = metrics["recovered"], licence(folder)
    text = CARD.format(
        licence=terms,
        licence_note=" and was not found in its folder" if terms == "unknown" else "",
        teacher=teacher,
        recipe=recipe,
        name=f"{_model_name(teacher)}-{recipe}",
        code=CODE,
        parameters=(model.parameters or 0) / 1e6,
        shapes="\n".join(_shapes(inputs)),
        made="\n".join(_made(inputs)),
        rows="\n".join(_row(role, metrics[role]) for role in ROLES if role in metrics),
        tokens=metrics["tokens"],
        windows=metrics["windows"],
        window=metrics["tokens"] // metrics["windows"],
        recovered=""
        if share is None
        else f"\nDistillation took back {share:.0%} of the loss that pruning had added.\n",
        tasks=_tasks(inputs["tasks"].metrics) if "tasks" in inputs else "",
        limits=LIMITS,
        versions=", ".join(f"{k} {v}" for k, v in model.versions.items()),
    )
    write_text_atomically(folder / "README.md", text)


def _model_name(teacher: str) -> str:
    """The last part of a folder, hub id or address, without its checksum and file ending."""
    return teacher.partition("#")[0].rstrip("/").split("/")[-1].removesuffix(".gguf")


def _shapes(inputs: Mapping[str, Manifest]) -> Iterator[str]:
    for role, name in (("teacher", "teacher"), ("this model", "checkpoint")):
        if name in inputs and (shape := inputs[name].architecture):
            yield SHAPE.format(role=role, **{**shape, "parameters": inputs[name].parameters or 0})


def _made(inputs: Mapping[str, Manifest]) -> Iterator[str]:
    """What was pruned, how much it was distilled, and on which text."""
    if "pruned" in inputs and (kept := inputs["pruned"].metrics.get("kept_layers")):
        scored = inputs["pruned"].metrics.get("layer_importance", {})
        dropped = sorted({int(layer) for layer in scored} - set(kept))
        if dropped:
            yield f"- Layers dropped, counted from 1: {', '.join(map(str, dropped))}."
    training = inputs["checkpoint"].metrics
    if "tokens" in training:
        yield f"- Distilled on {training['tokens']:,} tokens in {training['steps']:,} steps."
    if "data" in inputs:
        sources = inputs["data"].metrics.get("sources", [])
        named = ", ".join(f"`{_source_name(source)}`" for source in sources)
        yield f"- Text: {named}. Its licence was not recorded."


def _source_name(source: str) -> str:
    """A local file's name alone: where it lay says nothing to others."""
    return source if "://" in source else Path(source).name


def _row(role: str, figures: Mapping[str, float]) -> str:
    return ROW.format(
        role=role,
        parameters=figures["parameters"] / 1e6,
        loss=figures["loss"],
        error=figures["loss_standard_error"],
        perplexity=figures["perplexity"],
        kl=figures["kl_to_teacher"],
        agreement=figures["top1_agreement"],
    )


def _tasks(metrics: Mapping[str, Any]) -> str:
    """Scores in tasks, with their standard errors."""
    tasks = metrics["tasks"]
    roles = [role for role in ROLES if any(role in task for task in tasks.values())]
    lines = [
        "\n## Tasks\n",
        f"| task | metric | items | {' | '.join(roles)} |",
        "|---" * (3 + len(roles)) + "|",
    ]
    for name, task in tasks.items():
        scores = " | ".join(_score(task.get(role)) for role in roles)
        lines.append(f"| {name} | {task['metric']} | {task['items']} | {scores} |")
    return "\n".join(lines) + "\n\n± is the standard error.\n"


def _score(score: Mapping[str, float] | None) -> str:
    if score is None:
        return ""
    error = score.get("standard_error")
    return f"{score['value']:.3f}" + (f" ± {error:.3f}" if error is not None else "")
