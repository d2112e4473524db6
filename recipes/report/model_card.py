"""The exported model's card: what it is, what was measured, and code that runs as it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from nemo_convert.architecture import Architecture
from nemo_convert.hf import licence
from recipes.core.files import write_text_atomically
from recipes.core.manifest import Manifest
from recipes.data.results import DatasetResult
from recipes.data.sources import parse_source
from recipes.distillation.results import DistillationResult
from recipes.evaluation.results import ROLES, EvaluationResult, TaskResults
from recipes.pruning.results import HealResult, PruneResult
from recipes.report.serving import converted, servers

CARD = """\
---
{data}
---

# {name}

{parameters:.1f} M parameters, made from `{teacher}` with the recipe `{recipe}`: pruned with NVIDIA
ModelOpt's Minitron, then distilled from the unpruned model with NeMo.

## Use

```python
{code}
```

Servers that read this folder (not run when it was made):

```text
{servers}
```

Others read what is made of it (`optimum-intel` and `openvino-genai` on a CPU; llama.cpp):

```text
{converted}
```

## Shape

| | layers | hidden | feed-forward | heads | query groups | head size | vocabulary | parameters |
|---|---|---|---|---|---|---|---|---|
{shapes}

{made}

## Quality

Measured in {number_type} on {counted} in windows of {window} ({windows} windows, no document in
common with training); ± is the standard error over windows:

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
- Quality was measured before any quantization; a quantized engine's own may be lower. Speed depends
  on the engine and machine and is in the run's report, not here."""
SHAPE = (
    "| {role} | {num_layers} | {hidden_size} | {ffn_hidden_size} | {num_attention_heads} "
    "| {num_query_groups} | {kv_channels} | {vocab_size} | {parameters:,} |"
)
ROW = (
    "| {role} | {parameters:.1f} M | {q.loss:.3f} ± {q.loss_standard_error:.3f} "
    "| {q.perplexity:.1f} | {q.kl_to_teacher:.3f} | {q.top1_agreement:.1%} |"
)


def write_card(folder: Path, teacher: str, recipe: str, inputs: Mapping[str, Manifest]) -> None:
    """Replaces the teacher's card, which came along, by the student's own.

    Of the stage's inputs, whose manifests are given by name, optional ones add what they know.
    """
    model, evaluation = inputs["checkpoint"], inputs["evaluation"].result(EvaluationResult)
    share, terms = evaluation.recovered, licence(folder)
    tasks = inputs["tasks"].result(TaskResults) if "tasks" in inputs else None
    name = _plain(f"{_model_name(teacher)}-{recipe}")
    text = CARD.format(
        data=ModelCardData(
            license=_line(terms),
            base_model=_line(teacher),
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["pruned", "distilled"],
            model_name=name,
            eval_results=list(_results(evaluation, tasks)),
        ).to_yaml(),
        licence_note=" and was not found in its folder" if terms == "unknown" else "",
        teacher=_plain(teacher),
        recipe=_plain(recipe),
        name=name,
        code=CODE,
        servers="\n".join(one.line for one in servers(".")),
        converted="\n".join(_converted(model)),
        parameters=(model.parameters or 0) / 1e6,
        shapes="\n".join(_shapes(inputs)),
        made="\n".join(_made(inputs)),
        rows="\n".join(
            ROW.format(role=role, q=quality, parameters=quality.parameters / 1e6)
            for role, quality in evaluation.models().items()
        ),
        number_type=evaluation.number_type,
        counted=f"{evaluation.tokens:,} held-out tokens"
        if evaluation.predictions is None
        else f"{evaluation.predictions:,} predictions of a next token of held-out text",
        windows=evaluation.windows,
        window=evaluation.tokens // evaluation.windows,
        recovered=""
        if share is None
        else f"\nDistillation took back {share:.0%} of the loss that pruning had added.\n",
        tasks=_tasks(tasks) if tasks else "",
        limits=LIMITS,
        versions=", ".join(f"{k} {v}" for k, v in model.versions.items()),
    )
    write_text_atomically(folder / "README.md", text)


def _converted(model: Manifest) -> Iterator[str]:
    if model.architecture:
        yield from (one.line for one in converted(".", Architecture(**model.architecture)))


def _model_name(teacher: str) -> str:
    """The last part of a folder, hub id or address, without its checksum and file ending."""
    return teacher.partition("#")[0].rstrip("/").split("/")[-1].removesuffix(".gguf")


def _shapes(inputs: Mapping[str, Manifest]) -> Iterator[str]:
    for role, name in (("teacher", "teacher"), ("this model", "checkpoint")):
        if name in inputs and (shape := inputs[name].architecture):
            yield SHAPE.format(role=role, **{**shape, "parameters": inputs[name].parameters or 0})


def _made(inputs: Mapping[str, Manifest]) -> Iterator[str]:
    """What was pruned, how much it was distilled, and on which text."""
    pruned = inputs["pruned"].result_if("prune", PruneResult) if "pruned" in inputs else None
    if pruned and "teacher" in inputs and (shape := inputs["teacher"].architecture):
        every = range(1, shape["num_layers"] + 1)
        if dropped := [str(layer) for layer in every if layer not in pruned.kept_layers]:
            yield f"- Layers dropped, counted from 1: {', '.join(dropped)}."
    if "healed" in inputs and (healed := inputs["healed"].result_if("heal", HealResult)):
        yield (
            f"- Healed by least squares on {healed.calibration_tokens:,} tokens: KL to the teacher "
            f"{healed.kl_as_cut:.3f} → {healed.kl_healed:.3f} nats on other text."
        )
    if training := inputs["checkpoint"].result_if("distill", DistillationResult):
        yield f"- Distilled on {training.tokens:,} tokens in {training.steps:,} steps."
    if "data" in inputs:
        text = inputs["data"].result(DatasetResult)
        for source in text.sources:
            yield f"- Text: `{_source_name(source)}`. Licence: {_plain(text.licence(source))}."


def _source_name(source: str) -> str:
    """Without its options; of a local file the name alone: where it lay says nothing to others."""
    path = parse_source(source).path
    return _plain(path if "://" in path else Path(path).name)


def _line(text: str) -> str:
    """A text as one line, so that none of it can end the card's header."""
    return " ".join(text.split())


def _plain(text: str) -> str:
    """A name as part of a line of Markdown: it ends no code, cell or line, and is no markup."""
    return re.sub(r"[`<>|\[\]!\s]+", " ", text).strip()


def _results(evaluation: EvaluationResult, tasks: TaskResults | None) -> Iterator[EvalResult]:
    """What the student reached, as the hub lists it beside other models (``model-index``)."""
    result = partial(EvalResult, task_type="text-generation")
    texts = {name: each.distilled for name, each in evaluation.sources.items()}
    for name, found in (texts or {"held-out text": evaluation.distilled}).items():
        text = {"dataset_type": "text", "dataset_name": _line(name)}
        yield result(**text, metric_type="perplexity", metric_value=round(found.perplexity, 4))
        kl = round(found.kl_to_teacher, 5)
        yield result(**text, metric_type="kl_to_teacher", metric_value=kl)
    for name, task in (tasks.tasks if tasks else {}).items():
        score = round(task.distilled.value, 4)
        benchmark = {"dataset_type": _line(name), "dataset_name": _line(name)}
        yield result(**benchmark, metric_type=_line(task.metric), metric_value=score)


def _tasks(results: TaskResults) -> str:
    """Scores in tasks, with their standard errors."""
    lines = [
        "\n## Tasks\n",
        f"| task | metric | items | {' | '.join(ROLES)} |",
        "|---" * (3 + len(ROLES)) + "|",
    ]
    for name, task in results.tasks.items():
        scores = (f"{s.value:.3f} ± {s.standard_error:.3f}" for s in task.models().values())
        lines.append(
            f"| {_plain(name)} | {_plain(task.metric)} | {task.items} | {' | '.join(scores)} |"
        )
    return "\n".join(lines) + "\n\n± is the standard error.\n"
