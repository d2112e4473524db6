"""Measuring language models against a teacher on fixed windows of text."""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import no_init_weights

from nemo_convert import convert, nemo
from nemo_convert.hf import tokenizer_sha256
from recipes.backend.device import device
from recipes.core.files import write_text_atomically
from recipes.core.fingerprint import digest
from recipes.core.metrics import MetricsLog
from recipes.core.precision import dtype_of
from recipes.core.stage import Input
from recipes.core.statistics import mean, standard_error
from recipes.data.token_windows import TextWindows, read_windows
from recipes.evaluation.paired import recovered
from recipes.evaluation.predictions import TEACHER, Figures, FinalStates, Predictor, compare, read
from recipes.evaluation.results import (
    ROLES,
    EvaluationResult,
    ModelQuality,
    SourceQuality,
    TextQuality,
    TokenQuality,
)
from recipes.evaluation.settings import EvaluateConfig


def measure(
    cfg: EvaluateConfig, checkpoints: dict[str, Path], data: Input, out: Path, log: MetricsLog
) -> EvaluationResult:
    """Measures every checkpoint and writes ``results.json`` with per-window figures.

    One model is in memory at a time: each says all that it has to say about the text, and is gone.
    ``checkpoints`` are NeMo's, by role.
    """
    text = read_windows(data, "heldout", cfg.seq_length, cfg.num_windows)
    tokenizer = AutoTokenizer.from_pretrained(
        nemo.side_files(checkpoints[TEACHER]), trust_remote_code=False
    )
    every = max(1, len(text) // max(1, cfg.num_generations))
    picked = text.tokens[::every][: cfg.num_generations]
    end = cfg.prompt_tokens + cfg.new_tokens
    said = {"prompt": picked[:, : cfg.prompt_tokens], "text": picked[:, cfg.prompt_tokens : end]}
    readings, parameters = {}, {}
    for number, (role, path) in enumerate(checkpoints.items()):
        model = load_transformers(path, dtype_of(cfg.precision))
        done = partial(_progress, log, number * len(text), len(checkpoints) * len(text))
        readings[role] = read(Predictor.of(model), text, cfg.micro_batch_size, done)
        parameters[role] = sum(p.numel() for p in model.parameters())
        said[role] = _continue(cfg, model, said["prompt"], tokenizer.eos_token_id)
        del model
    scores = {role: Scores.of(each, text) for role, each in compare(readings, text).items()}
    results = {
        role: ModelQuality(**vars(each.quality()), parameters=parameters[role])
        for role, each in scores.items()
    }
    written = {name: [tokenizer.decode(ids) for ids in each] for name, each in said.items()}
    detail = {
        "results": {role: asdict(quality) for role, quality in results.items()},
        "window_losses": {role: each.losses for role, each in scores.items()},
        "generations": [
            dict(zip(written, each, strict=True)) for each in zip(*written.values(), strict=True)
        ],
    }
    write_text_atomically(out / "results.json", json.dumps(detail, indent=1, ensure_ascii=False))
    return EvaluationResult(
        **results,
        windows=len(text),
        tokens=text.tokens.numel(),
        predictions=text.predictions,
        precision=cfg.precision,
        recovered=_recovered(scores),
        sources=_by_source(scores, text) if len(text.sources) > 1 else {},
    )


@dataclass
class Scores:
    """Figures of one model, a mean for each window over its predictions that count."""

    losses: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, figures: Figures, text: TextWindows) -> Scores:
        """Takes the means of a text's windows."""
        sizes = text.counted.sum(dim=1).tolist()
        every = (figures.losses, figures.divergences, figures.agreements)
        return cls(*([part.mean().item() for part in each.split(sizes)] for each in every))

    def __add__(self, more: Scores) -> Scores:
        """Those of further windows behind these."""
        return Scores(*(mine + vars(more)[name] for name, mine in vars(self).items()))

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
    models: Mapping[str, Predictor], text: TextWindows, micro_batch_size: int, log: MetricsLog
) -> dict[str, Scores]:
    """Compares models that are in memory together with the one that is named as the teacher."""
    found = {role: Scores() for role in models}
    for start in range(0, len(text), micro_batch_size):
        part = text[start : start + micro_batch_size]
        readings = {role: read(model, part, micro_batch_size) for role, model in models.items()}
        for role, figures in compare(readings, part).items():
            found[role] += Scores.of(figures, part)
        log.progress("evaluate", start + len(part), len(text))
    return found


def beside(teacher: FinalStates, student: FinalStates, text: TextWindows) -> TokenQuality:
    """What a model made of a text, beside what its teacher did."""
    found = compare({TEACHER: teacher, "student": student}, text)["student"]
    loss, kl = (each.double().mean().item() for each in (found.losses, found.divergences))
    return TokenQuality(math.exp(loss), kl)


def measure_checkpoints(
    teacher: Path, students: Sequence[Path], text: TextWindows, precision: str, size: int
) -> list[TokenQuality]:
    """NeMo checkpoints beside a teacher's, one in memory at a time, ``size`` windows at once."""

    def reading(checkpoint: Path) -> FinalStates:
        model = load_transformers(checkpoint, dtype_of(precision))
        found: FinalStates = read(Predictor.of(model), text, size)
        return found

    reference = reading(teacher)
    return [beside(reference, reading(student), text) for student in students]


def _by_source(scores: Mapping[str, Scores], text: TextWindows) -> dict[str, SourceQuality]:
    """What ``measure`` returns, of each source's windows alone."""
    return {
        source: SourceQuality(
            **{role: scores[role].quality(span) for role in ROLES},
            windows=len(text[span]),
            tokens=text[span].tokens.numel(),
            predictions=text[span].predictions,
            recovered=_recovered(scores, span),
        )
        for source, span in text.sources.items()
    }


def _recovered(scores: Mapping[str, Scores], chosen: slice = slice(None)) -> float | None:
    """Share of the loss that pruning added and distillation took away again."""
    return recovered(*([-loss for loss in scores[role].losses[chosen]] for role in ROLES))


def load_transformers(checkpoint: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A NeMo checkpoint as a transformers model, on the GPU if there is one."""
    config = AutoConfig.from_pretrained(nemo.side_files(checkpoint), trust_remote_code=False)
    config.head_dim = nemo.architecture_of(checkpoint).kv_channels
    return with_weights(config, convert.hf_weights(checkpoint), dtype)


def with_weights(
    config: PretrainedConfig, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> PreTrainedModel:
    """A transformers model of named weights, which are read last, on the GPU if there is one.

    Raises:
        ValueError: They are not the config's.
    """
    gc.collect()  # the one before is a part of circles, and may still be there
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    missing, unexpected = model.load_state_dict(dict(weights), strict=False)
    model.tie_weights()
    if unexpected or [name for name in missing if name != "lm_head.weight"]:
        raise ValueError(f"{config.model_type}: missing {missing}, unexpected {unexpected}")
    evaluated: PreTrainedModel = model.to(device()).eval()
    return evaluated


def model_sha256(model: torch.nn.Module, checkpoint: Path) -> str:
    """Hash of what a model is: weights, the whole config.json (RoPE, epsilons), tokenizer."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().view(torch.uint8).cpu().numpy().data)
    return digest(
        {
            "weights": total.hexdigest(),
            "config": nemo.read_config(checkpoint),
            "tokenizer": tokenizer_sha256(nemo.side_files(checkpoint)),
        }
    )


def _continue(cfg: EvaluateConfig, model: PreTrainedModel, prompts: Tensor, pad: int) -> Tensor:
    """What a model writes after prompts [n, prompt_tokens], greedily: [n, new_tokens] at most."""
    continued: Tensor = model.generate(
        prompts.to(model.device),
        attention_mask=torch.ones_like(prompts, device=model.device),
        max_new_tokens=cfg.new_tokens,
        do_sample=False,
        pad_token_id=pad,
    )
    return continued[:, cfg.prompt_tokens :]


def _progress(log: MetricsLog, before: int, total: int, done: int) -> None:
    log.progress("evaluate", before + done, total)
