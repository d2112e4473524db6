"""Measuring language models against a teacher on fixed windows of text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import no_init_weights

from nemo_convert import convert, nemo
from recipes.indexed_dataset import windows
from recipes.manifest import write_text_atomically
from recipes.metrics import MetricsLog

if TYPE_CHECKING:
    from recipes.evaluate import Config

TEACHER = "teacher"
Model = Callable[[Tensor], Any]


def measure(
    cfg: Config, checkpoints: dict[str, Path], data: Path, out: Path, log: MetricsLog
) -> dict[str, Any]:
    """Measures every checkpoint and writes ``results.json`` with per-window figures.

    Args:
        cfg: The stage's config.
        checkpoints: NeMo checkpoints by role; one is the teacher.
        data: Artifact of ``prepare_data``.
        out: Where to write.
        log: Metrics file.

    Returns:
        The summary that goes into the manifest.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = windows(data, "heldout", cfg.seq_length, cfg.num_windows).to(device)
    models = {role: load_transformers(path).to(device) for role, path in checkpoints.items()}
    scores = score(models, text, cfg.micro_batch_size, log)
    results = {
        role: {
            **scores[role].summary(),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        for role, model in models.items()
    }
    generations = _generate(cfg, models, checkpoints[TEACHER], text, log)
    losses = {role: scores[role].losses for role in models}
    detail = {"results": results, "window_losses": losses, "generations": generations}
    write_text_atomically(out / "results.json", json.dumps(detail, indent=1, ensure_ascii=False))
    return {
        **results,
        "windows": len(text),
        "tokens": text.numel(),
        "recovered": recovered(results),
    }


@dataclass
class Scores:
    """Figures of one model, a mean for each window."""

    losses: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Means over the windows."""
        return {
            "loss": _mean(self.losses),
            "loss_standard_error": _standard_error(self.losses),
            "perplexity": math.exp(_mean(self.losses)),
            "kl_to_teacher": _mean(self.divergences),
            "top1_agreement": _mean(self.agreements),
        }


def score(
    models: Mapping[str, Model], text: Tensor, micro_batch_size: int, log: MetricsLog
) -> dict[str, Scores]:
    """Compares models with the one that is named as the teacher.

    Args:
        models: What maps tokens [batch, sequence] to an output with ``logits``, by role.
        text: Windows [windows, sequence].
        micro_batch_size: Windows in a forward pass.
        log: Metrics file.
    """
    found = {role: Scores() for role in models}
    for start in range(0, len(text), micro_batch_size):
        batch = text[start : start + micro_batch_size]
        reference = _log_probabilities(models[TEACHER], batch)
        for role, model in models.items():
            scores = reference if role == TEACHER else _log_probabilities(model, batch)
            found[role].losses += _losses(scores, batch).mean(dim=1).tolist()
            found[role].divergences += _kl(reference, scores).mean(dim=1).tolist()
            found[role].agreements += (
                (scores.argmax(-1) == reference.argmax(-1)).float().mean(dim=1).tolist()
            )
        log.progress("evaluate", start + len(batch), len(text))
    return found


def recovered(results: dict[str, dict[str, float]]) -> float | None:
    """Share of the loss that pruning added and distillation took away again.

    1 is the teacher's quality, 0 the pruned model's. ``None`` where pruning cost nothing.
    """
    lost = results["pruned"]["loss"] - results[TEACHER]["loss"]
    won = results["pruned"]["loss"] - results["distilled"]["loss"]
    return won / lost if lost > 0 else None


def load_transformers(checkpoint: Path) -> Any:
    """A NeMo checkpoint as a transformers model in float32; nothing is written to disk."""
    config = AutoConfig.from_pretrained(nemo.side_files(checkpoint))
    config.head_dim = nemo.architecture_of(checkpoint).kv_channels
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(dict(convert.hf_weights(checkpoint)), strict=False)
    model.tie_weights()
    if unexpected or [name for name in missing if name != "lm_head.weight"]:
        raise ValueError(f"{checkpoint}: missing {missing}, unexpected {unexpected}")
    return model.eval()


@torch.no_grad()
def _log_probabilities(model: Any, tokens: Tensor) -> Tensor:
    """Log-probabilities [batch, sequence - 1, vocabulary] of every next token."""
    return torch.log_softmax(model(tokens).logits[:, :-1].float(), dim=-1)


def _losses(scores: Tensor, tokens: Tensor) -> Tensor:
    return -scores.gather(-1, tokens[:, 1:, None]).squeeze(-1)


def _kl(reference: Tensor, scores: Tensor) -> Tensor:
    return torch.stack(
        [(r.exp() * (r - s)).sum(-1) for r, s in zip(reference, scores, strict=True)]
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _standard_error(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def _generate(
    cfg: Config, models: dict[str, Any], teacher: Path, text: Tensor, log: MetricsLog
) -> list[dict[str, str]]:
    """Greedy continuations of the first tokens of a few windows, with what the text really says."""
    tokenizer = AutoTokenizer.from_pretrained(nemo.side_files(teacher))
    end = cfg.prompt_tokens + cfg.new_tokens
    picked = text[:: max(1, len(text) // max(1, cfg.num_generations))][: cfg.num_generations]
    prompts = picked[:, : cfg.prompt_tokens]
    samples = [
        {
            "prompt": tokenizer.decode(window[: cfg.prompt_tokens]),
            "text": tokenizer.decode(window[cfg.prompt_tokens : end]),
        }
        for window in picked
    ]
    for number, (role, model) in enumerate(models.items(), 1):
        continued = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=cfg.new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        for sample, ids in zip(samples, continued, strict=True):
            sample[role] = tokenizer.decode(ids[cfg.prompt_tokens :])
        log.progress("generate", number, len(models))
    return samples
