"""ModelOpt's Minitron on a NeMo checkpoint (arXiv:2407.14679)."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import modelopt.torch.prune as mtp
import torch
from modelopt.torch.prune.plugins.mcore_minitron import (
    drop_mcore_language_model_layers,
    get_mcore_minitron_config,
)
from safetensors.torch import save_file

from nemo_convert import cpu_backend, nemo
from nemo_convert.families import FAMILIES
from nemo_convert.hf import copy_side_files
from recipes.architecture import Architecture
from recipes.errors import RecipeError
from recipes.manifest import write_text_atomically
from recipes.metrics import MetricsLog

if TYPE_CHECKING:
    from recipes.prune import Config

HF_NAMES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
}
"""Megatron's and Hugging Face's names of what pruning can change or must make explicit."""
HF_EXPERT_NAMES = {
    "num_moe_experts": "num_experts",
    "moe_ffn_hidden_size": "moe_intermediate_size",
}


def prune_checkpoint(
    cfg: Config,
    teacher: Path,
    student: Architecture,
    calibration: torch.Tensor,
    out: Path,
    log: MetricsLog,
) -> dict[str, Any]:
    """Prunes ``teacher`` to the shape of ``student`` and writes it to ``out``.

    Args:
        cfg: The stage's config.
        teacher: NeMo checkpoint.
        student: Shape to reach.
        calibration: Token windows [windows, sequence].
        out: Checkpoint directory to write; ``importance.*`` go beside it.
        log: Metrics file.

    Returns:
        Kept layers and layer importance, both counted from 1.

    Raises:
        RecipeError: A weight of the pruned model has not the shape that its config says.
    """
    cpu_backend.enable()
    nemo.initialize(nemo.Parallelism())
    model = nemo.restore_model(teacher)
    core = nemo.build_core(model, nemo.Parallelism())
    nemo.load_weights(core, teacher)
    layers = core.config.num_layers
    config = {"forward_loop": _forward_loop(calibration, cfg.micro_batch_size, log)}
    core, found = mtp.prune(
        core.eval(),
        mode=[("mcore_minitron", _divisors(cfg))],
        constraints={"export_config": _export_config(cfg, layers)},
        dummy_input=None,  # unused by this mode
        config=config,
    )
    layer_scores = {int(layer): float(score) for layer, score in found["layer_scores"].items()}
    if cfg.drop_layers:
        drop_mcore_language_model_layers(core, layers_to_drop=cfg.drop_layers)
        kept = sorted(set(range(1, layers + 1)) - set(cfg.drop_layers))
    else:
        kept = sorted(found["sorted_layers"][: student.num_layers])
    check_shapes(core, student)
    _save_importance(found["activations_per_rank"][0], layer_scores, out.parent)
    _save_student(model, core, teacher, student, out)
    return {"kept_layers": kept, "layer_importance": layer_scores}


def _export_config(cfg: Config, layers: int) -> dict[str, int]:
    """The shape for ModelOpt. Naming the full depth makes it score layers and drop none."""
    targets = cfg.targets()
    return {**targets.width(), "num_layers": targets.num_layers or layers}


def _divisors(cfg: Config) -> dict[str, Any]:
    """ModelOpt offers only multiples of these, and skips any other target without a word."""
    config: dict[str, Any] = get_mcore_minitron_config(
        hidden_size_divisor=cfg.hidden_size_divisor,
        ffn_hidden_size_divisor=cfg.ffn_hidden_size_divisor,
        num_moe_experts_divisor=1,
        num_layers_divisor=1,
    )
    return config


def _forward_loop(calibration: torch.Tensor, batch: int, log: MetricsLog) -> Callable[[Any], None]:
    def loop(model: Any) -> None:
        device = next(model.parameters()).device
        model.post_process = False  # importance needs no logits, and they are a fifth of the work
        for done, tokens in _batches(calibration, batch):
            positions = torch.arange(tokens.shape[1], device=device)[None].expand_as(tokens)
            model(tokens.to(device), positions, None)
            log.progress("calibrate", done, len(calibration))
        model.post_process = True

    return loop


def _batches(windows: torch.Tensor, size: int) -> Iterator[tuple[int, torch.Tensor]]:
    for start in range(0, len(windows), size):
        batch = windows[start : start + size]
        yield start + len(batch), batch


def check_shapes(core: Any, arch: Architecture) -> None:
    """Compares every weight with the shape that the config says.

    Raises:
        RecipeError: One differs, or a weight is missing or left over.
    """
    family = FAMILIES[arch.hf_architecture]
    rows = family.rows(arch)
    found = {family.canonical_name(n): tuple(p.shape) for n, p in core.named_parameters()}
    expected = {name: weight.shape(arch) for name, (weight, _) in rows.items()}
    wrong = [
        f"{name}: {found.get(name)} instead of {expected.get(name)}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    if wrong:
        raise RecipeError(
            f"pruned weights do not match the config ({len(wrong)} of {len(expected)}): {wrong[0]}",
            "ModelOpt may have skipped an axis; check the targets against the divisors",
        )


def _save_importance(
    activations: dict[str, Any], layer_scores: dict[int, float], folder: Path
) -> None:
    """Keeps the scores as data: layers as JSON, widths as tensors named by module."""
    tensors = {}
    for name, value in activations.items():
        if isinstance(value, dict):  # one tensor per hooked layer norm
            value = torch.stack([v.pow(0.5) for v in value.values()]).sum(dim=0)
        elif value is not None:
            value = value.pow(0.5)
        if value is not None:
            tensors[name or "hidden_size"] = value.float().cpu().contiguous()
    save_file(tensors, folder / "importance.safetensors")
    text = json.dumps({"layers": layer_scores}, indent=1)
    write_text_atomically(folder / "importance.json", text)


def _save_student(model: Any, core: Any, teacher: Path, student: Architecture, out: Path) -> None:
    """Writes the student, its NeMo context and its ``config.json``, with explicit head sizes."""
    config = nemo.read_config(teacher)
    names = HF_NAMES | (HF_EXPERT_NAMES if student.num_moe_experts else {})
    for megatron, hf in names.items():
        value = getattr(student, megatron)
        config[hf] = value
        setattr(model.__io__.config, megatron, value)
    if "layer_types" in config:  # one a layer, all the same: a sliding window is refused
        config["layer_types"] = config["layer_types"][: student.num_layers]
    with tempfile.TemporaryDirectory() as temporary:
        side = Path(temporary) / nemo.SIDE
        copy_side_files(nemo.side_files(teacher), side)
        write_text_atomically(side / "config.json", json.dumps(config, indent=2) + "\n")
        nemo.save_checkpoint(out, model, core, side, rank=0)
