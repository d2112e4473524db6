"""Writes the exported model's card: origin, measured quality, and commands that serve the model.

The card is a ``README.md`` with a YAML header, which the Hugging Face hub reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from nemo_convert.architecture import Architecture
from nemo_convert.hub import hub_arguments, is_hub_id
from nemo_convert.licences import card_fields, forbids_commercial_use, model_licence
from recipes.core.manifest import Manifest
from recipes.core.stage import Inputs
from recipes.data.results import NOT_COMPARED, DatasetResult
from recipes.data.sources import parse_source
from recipes.distillation.results import KeptLayers
from recipes.distillation.settings import uses_teacher
from recipes.evaluation.results import AddLayersResult, EvaluationResult, TaskResults
from recipes.pruning.results import HealResult
from recipes.pruning.targets import is_refused_by_transformers_5
from recipes.report.cost import datasets, distillations
from recipes.report.format import plain, render_template
from recipes.report.serving import conversion_servers, folder_servers
from recipes.report.settings import CARD_TEMPLATE


def write_card(
    folder: Path, teacher: str, recipe: str, stages: Inputs, earlier: Mapping[str, Manifest]
) -> None:
    """Writes the card as ``README.md`` of the exported folder, in place of the teacher's card.

    Args:
        folder: The exported Hugging Face folder, with the teacher's card.
        teacher: Path, hub id or address of the teacher.
        recipe: Name of the recipe.
        stages: The inputs of ``export_hf``. Only ``checkpoint`` and ``evaluation`` are required;
            the others add lines to the card.
        earlier: Manifests of all stages upstream of these inputs, by the stage's name.
    """
    inputs = {name: item.manifest for name, item in stages.items()}
    model, evaluation = inputs["checkpoint"], inputs["evaluation"].result(EvaluationResult)
    shape = Architecture(**model.architecture) if model.architecture else None
    # The last part of the teacher's path or address, without the options after ``#``.
    teacher_name = teacher.partition("#")[0].rstrip("/").split("/")[-1].removesuffix(".gguf")
    name = plain(f"{teacher_name}-{recipe}")
    manifests = [*earlier.values(), *inputs.values()]
    sources = _sources(datasets(manifests))
    restricted = [licence for _, licence, _ in sources if forbids_commercial_use(licence)]
    header = ModelCardData(
        **_licence_fields(folder, restricted),
        # The hub refuses a card whose ``base_model`` is not the id of a model.
        base_model=hub_arguments(teacher)["repo_id"] if is_hub_id(teacher) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", "distilled"],
        model_name=name,
        eval_results=list(_hub_results(evaluation, inputs.get("tasks"))),
    )
    content = {
        "header": header.to_yaml(),
        "name": name,
        # The card is public, so it does not show a local path.
        "teacher": teacher if is_hub_id(teacher) or "://" in teacher else teacher_name,
        "recipe": recipe,
        "licence": model_licence(folder),
        "model": model,
        # Manifests whose architectures the card shows, by label. The teacher's may be missing.
        "shapes": {**{n: m for n, m in inputs.items() if n == "teacher"}, "this model": model},
        "needs_transformers_4": shape is not None and is_refused_by_transformers_5(shape),
        "experts": shape.num_moe_experts if shape else 0,
        "dropped": _dropped_layers(inputs),
        "added": _added_layers(model),
        "healed": inputs["healed"].result_if("heal", HealResult) if "healed" in inputs else None,
        "phases": [phase for _, _, phase in distillations({**earlier, "this model": model})],
        "sources": sources,
        "compared": _is_held_out(manifests, inputs["evaluation"]),
        "origin": _origin(manifests),
        "restricted": restricted,
        "accepted": _accepted_stages(stages, earlier),
        "evaluation": evaluation,
        "measured_on": f"{evaluation.predictions:,} next-token predictions on held-out text",
        "tasks": inputs["tasks"].result(TaskResults) if "tasks" in inputs else None,
        "servers": list(folder_servers(".", shape)),
        "conversions": list(conversion_servers(".", shape)) if shape else [],
    }
    render_template(CARD_TEMPLATE.name, content, folder / "README.md")


def _is_held_out(manifests: Iterable[Manifest], evaluation: Manifest) -> bool:
    """Returns whether no document of the evaluation's text is in any training text.

    ``manifests`` are those of all stages that made the model.
    """
    datasets_used = [manifest for manifest in manifests if manifest.stage == "prepare_data"]
    evaluated = evaluation.inputs.get("data")
    # A dataset's splits share no document with each other. A dataset with the input ``held_out``
    # shares no document with the held-out split of that input. A result with a ``sample`` is text
    # of ``data.prefix``, which was not compared with held-out text.
    return bool(datasets_used) and all(
        evaluated in (dataset.fingerprint, dataset.inputs.get("held_out"))
        and not dataset.result(DatasetResult).sample
        for dataset in datasets_used
    )


def _origin(manifests: Sequence[Manifest]) -> str:
    """Describes how stages made a model, as in "pruned, then adjusted by least squares"."""
    by_stage = {manifest.stage: manifest for manifest in manifests}
    steps = []
    if pruned := by_stage.get("prune"):
        criteria = ", ".join(_pruning_criteria(pruned, by_stage.get("import_hf", pruned)))
        steps.append(f"pruned ({criteria})" if criteria else "pruned")
    if "heal" in by_stage:
        steps.append("adjusted by least squares")
    distill_configs = [manifest.config for manifest in manifests if manifest.stage == "distill"]
    if any(map(uses_teacher, distill_configs)):
        step = "distilled with NeMo from the unpruned model"
        if "correct_teacher" in by_stage:
            step += " after fine-tuning it on the training text"
        steps.append(step)
    elif distill_configs:
        steps.append("trained with NeMo on text, without a teacher")
    return ", then ".join(steps)


def _pruning_criteria(pruned: Manifest, teacher: Manifest) -> Iterator[str]:
    """Yields how ``prune`` chose the removed layers, if any, and the removed widths, if any."""
    shape = pruned.architecture or {}
    teacher_shape = teacher.architecture or shape
    changed = {axis for axis, size in teacher_shape.items() if size != shape[axis]}
    if pruned.config["drop_layers"]:
        yield "layers: named in the settings"
    elif "num_layers" in changed and pruned.config["layer_importance"] == "block_influence":
        yield "layers: by block influence, arXiv:2403.03853"
    elif "num_layers" in changed:
        yield "layers: by this repository's measurement of the loss without them"
    if changed - {"num_layers"}:
        yield "widths: by the importance scores of NVIDIA ModelOpt's Minitron"


def _accepted_stages(stages: Inputs, earlier: Mapping[str, Manifest]) -> list[str]:
    """Returns the names of stages whose stale results the user kept.

    A result is stale if settings, inputs, code or libraries changed after it was made.
    """
    manifests = {**earlier, **{item.directory.name: item.manifest for item in stages.values()}}
    return [name for name, manifest in manifests.items() if manifest.accepted]


def _added_layers(model: Manifest) -> list[int]:
    """Returns the teacher's layers that were added after the distillation, counted from 1."""
    result = model.result_if("add_layers", AddLayersResult)
    return result.added_layers if result else []


def _dropped_layers(inputs: Mapping[str, Manifest]) -> list[int]:
    """Returns the teacher's layers that the model does not have, counted from 1.

    The list is empty if the model's layers or the teacher's number of layers are not known.
    """
    kept_layers = inputs["checkpoint"].result(KeptLayers).kept_layers
    teacher_shape = inputs["teacher"].architecture if "teacher" in inputs else None
    if kept_layers is None or teacher_shape is None:
        return []
    teacher_layers = range(1, teacher_shape["num_layers"] + 1)
    return [layer for layer in teacher_layers if layer not in kept_layers]


def _sources(texts: Iterable[DatasetResult]) -> list[tuple[str, str, str]]:
    """Returns the name, licence and note of each text source, without duplicates.

    The card is public, so the name of a local file does not include the file's folder.
    """
    sources: dict[tuple[str, str, str], None] = {}  # an ordered set
    for text in texts:
        for entry in text.sources:
            path = parse_source(entry).path
            name = path if "://" in path else Path(path).name
            # Replaces Markdown syntax by spaces, as ``plain`` does, but not the brackets of file
            # patterns. Inserts a space into "](", because Markdown would make a link of it.
            name = re.sub(r"[`<>|\s]+|(?<=\])(?=\()", " ", name)
            sources[name, text.licence(entry), NOT_COMPARED if text.sample else ""] = None
    return list(sources)


def _licence_fields(folder: Path, restricted: Iterable[str]) -> dict[str, Any]:
    """Returns the header's fields on the licence.

    The fields are those of the teacher's card, which is in ``folder``. ``license_name`` also names
    the ``restricted`` licences: those of training text that forbid commercial use. If the student
    is later used as a teacher, the plan of that run reads the restriction from ``license_name``.
    """
    keys = ("license", "license_name", "license_link")
    fields: dict[str, Any] = {}
    for key, value in card_fields(folder).items():
        if key in keys and value:
            if isinstance(value, list):  # a model may have several licences
                fields[key] = [_one_line(str(item)) for item in value]
            else:
                fields[key] = _one_line(str(value))
    if "license_name" in fields:  # a name without ``license: other`` is not valid on the hub
        fields.setdefault("license", "other")
    if text_licences := dict.fromkeys(restricted):  # without duplicates
        licences = "-and-".join([model_licence(folder), *text_licences]).lower()
        # The hub expects an id, such as apache-2.0-and-cc-by-nc-4.0.
        name = re.sub(r"[^a-z0-9.]+", "-", licences).strip("-")
        fields |= {"license": "other", "license_name": name}
    return {"license": "unknown", **fields}


def _one_line(text: str) -> str:
    """Returns a text as one line, so that it cannot end the card's YAML header."""
    return " ".join(text.split())


def _hub_results(evaluation: EvaluationResult, tasks: Manifest | None) -> Iterator[EvalResult]:
    """Yields the student's results for ``model-index``, the hub's list of results in a card.

    Each source of held-out text is listed as a dataset. ``tasks`` is the manifest of
    ``evaluate_tasks``; ``None`` if no benchmarks were run.
    """
    make_result = partial(EvalResult, task_type="text-generation")
    qualities = {name: source.distilled for name, source in evaluation.sources.items()}
    for name, quality in (qualities or {"held-out text": evaluation.distilled}).items():
        source = _one_line(name)
        # Libraries merge results with equal ``dataset_type`` and ``dataset_config``, even if
        # ``dataset_name`` differs. So each source needs its own ``dataset_config``.
        dataset = {"dataset_type": "text", "dataset_name": source, "dataset_config": source}
        perplexity, kl = round(quality.perplexity, 4), round(quality.kl_to_teacher, 5)
        yield make_result(**dataset, metric_type="perplexity", metric_value=perplexity)
        yield make_result(**dataset, metric_type="kl_to_teacher", metric_value=kl)
    if tasks is None:
        return
    limit = tasks.config.get("limit")
    for name, task in tasks.result(TaskResults).tasks.items():
        score = round(task.distilled.value, 4)
        benchmark = {
            "dataset_type": _one_line(name),
            "dataset_name": _one_line(name),
            "dataset_split": task.split,
            "dataset_args": {"num_fewshot": task.num_fewshot, "limit": limit},
        }
        yield make_result(**benchmark, metric_type=_one_line(task.metric), metric_value=score)
