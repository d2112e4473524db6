"""Measuring language models against a teacher on fixed windows of text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_utils import no_init_weights

from nemo_convert import convert, nemo
from nemo_convert.cpu_backend import device
from recipes.core.files import write_text_atomically
from recipes.core.metrics import MetricsLog
from recipes.core.stage import Input
from recipes.core.statistics import mean, standard_error
from recipes.data.results import DatasetResult, SourceTokens
from recipes.data.token_windows import windows
from recipes.evaluation.paired import recovered
from recipes.evaluation.results import (
    ROLES,
    EvaluationResult,
    ModelQuality,
    SourceQuality,
    TextQuality,
)
from recipes.evaluation.settings import EvaluateConfig

TEACHER = "teacher"
Model = Callable[[Tensor], Any]


def measure(
    cfg: EvaluateConfig, checkpoints: dict[str, Path], data: Input, out: Path, log: MetricsLog
) -> EvaluationResult:
    """Measures every checkpoint and writes ``results.json`` with per-window figures.

    Args:
        cfg: The stage's config.
        checkpoints: NeMo checkpoints by role.
        data: Output of ``prepare_data``.
        out: Where to write.
        log: Metrics file.
    """
    sources = heldout_windows(cfg, data)
    text = torch.cat(list(sources.values())).to(device())
    models = {role: load_transformers(path) for role, path in checkpoints.items()}
    scores = score(models, text, cfg.micro_batch_size, log)
    results = {
        role: ModelQuality(
            **vars(scores[role].quality()), parameters=sum(p.numel() for p in model.parameters())
        )
        for role, model in models.items()
    }
    generations = _generate(cfg, models, checkpoints[TEACHER], text, log)
    losses = {role: scores[role].losses for role in models}
    detail = {
        "results": {role: asdict(quality) for role, quality in results.items()},
        "window_losses": losses,
        "generations": generations,
    }
    write_text_atomically(out / "results.json", json.dumps(detail, indent=1, ensure_ascii=False))
    return EvaluationResult(
        **results,
        windows=len(text),
        tokens=text.numel(),
        recovered=_recovered(scores),
        sources=_by_source(scores, sources) if len(sources) > 1 else {},
    )


def heldout_windows(cfg: EvaluateConfig, data: Input) -> dict[str, Tensor]:
    """Held-out windows by the source of their text, as many from each, int64 [n, seq_length].

    A part holds its sources one after the other; no window here runs over from one to the next. A
    source whose held-out text is shorter than a window has none.
    """
    prepared = data.manifest.result(DatasetResult)
    whole = [SourceTokens("all", prepared.tokens["heldout"])]
    lengths = prepared.heldout_sources or whole
    usable = sum(entry.tokens >= cfg.seq_length for entry in lengths)
    count = math.ceil(cfg.num_windows / max(1, usable))
    found, start = {}, 0
    for entry in lengths:
        span = slice(start, start + entry.tokens)
        text = windows(data.artifact, "heldout", cfg.seq_length, count, span)
        if len(text):
            found[entry.source] = text
        start = span.stop
    return found


@dataclass
class Scores:
    """Figures of one model, a mean for each window."""

    losses: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)

    def quality(self, chosen: slice = slice(None)) -> TextQuality:
        """Means over the windows, or some of them."""
        losses = self.losses[chosen]
        return TextQuality(
            loss=mean(losses),
            loss_standard_error=standard_error(losses),
            perplexity=math.exp(mean(losses)),
            kl_to_teacher=mean(self.divergences[chosen]),
            top1_agreement=mean(self.agreements[chosen]),
        )


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
            agrees = (scores.argmax(-1) == reference.argmax(-1)).float()
            found[role].losses += _losses(scores, batch).mean(dim=1).tolist()
            found[role].divergences += _kl(reference, scores).mean(dim=1).tolist()
            found[role].agreements += agrees.mean(dim=1).tolist()
        log.progress("evaluate", start + len(batch), len(text))
    return found


def _by_source(
    scores: Mapping[str, Scores], sources: dict[str, Tensor]
) -> dict[str, SourceQuality]:
    """What ``measure`` returns, of each source's windows alone."""
    found, start = {}, 0
    for source, text in sources.items():
        span = slice(start, start + len(text))
        found[source] = SourceQuality(
            **{role: scores[role].quality(span) for role in ROLES},
            windows=len(text),
            tokens=text.numel(),
            recovered=_recovered(scores, span),
        )
        start = span.stop
    return found


def _recovered(scores: Mapping[str, Scores], chosen: slice = slice(None)) -> float | None:
    """Share of the loss that pruning added and distillation took away again."""
    return recovered(*([-loss for loss in scores[role].losses[chosen]] for role in ROLES))


def load_transformers(checkpoint: Path) -> PreTrainedModel:
    """A NeMo checkpoint as a transformers model in float32, on the GPU if there is one."""
    config = AutoConfig.from_pretrained(nemo.side_files(checkpoint))
    config.head_dim = nemo.architecture_of(checkpoint).kv_channels
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(dict(convert.hf_weights(checkpoint)), strict=False)
    model.tie_weights()
    if unexpected or [name for name in missing if name != "lm_head.weight"]:
        raise ValueError(f"{checkpoint}: missing {missing}, unexpected {unexpected}")
    evaluated: PreTrainedModel = model.to(device()).eval()
    return evaluated


@torch.no_grad()
def _log_probabilities(model: Model, tokens: Tensor) -> Tensor:
    """Log-probabilities [batch, sequence - 1, vocabulary] of every next token."""
    return torch.log_softmax(model(tokens).logits[:, :-1].float(), dim=-1)


def _losses(scores: Tensor, tokens: Tensor) -> Tensor:
    return -scores.gather(-1, tokens[:, 1:, None]).squeeze(-1)


def _kl(reference: Tensor, scores: Tensor) -> Tensor:
    return torch.stack(
        [(r.exp() * (r - s)).sum(-1) for r, s in zip(reference, scores, strict=True)]
    )


def _generate(
    cfg: EvaluateConfig,
    models: dict[str, PreTrainedModel],
    teacher: Path,
    text: Tensor,
    log: MetricsLog,
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
