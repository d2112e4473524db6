"""Evaluates language models against a teacher on fixed sequences of text."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import zip_longest
from pathlib import Path
from statistics import fmean

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
from nemo_convert.generation_config import GENERATION_CONFIG
from nemo_convert.hf import tokenizer_sha256
from recipes.backend.device import device
from recipes.core.errors import RecipeError
from recipes.core.files import json_text, read_json, write_text_atomically
from recipes.core.fingerprint import digest
from recipes.core.metrics import MetricsLog
from recipes.core.precision import dtype_of
from recipes.core.stage import Input, rank, world_size
from recipes.core.statistics import perplexity, standard_error
from recipes.data.token_sequences import TextSequences, read_sequences
from recipes.evaluation.predictions import (
    TEACHER,
    FinalStates,
    PredictionMetrics,
    Predictor,
    compare_predictions,
    compute_states,
)
from recipes.evaluation.ranks import gather
from recipes.evaluation.results import (
    ROLES,
    EvaluationResult,
    ModelQuality,
    SourceQuality,
    TextQuality,
    TokenQuality,
    recovered,
)
from recipes.evaluation.settings import EvaluateConfig


def measure(
    cfg: EvaluateConfig, checkpoints: dict[str, Path], data: Input, out: Path, log: MetricsLog
) -> EvaluationResult:
    """Evaluates NeMo checkpoints on held-out text, with one model in memory at a time.

    ``checkpoints`` has a checkpoint for each of ``ROLES``; ``data`` is the output of
    ``prepare_data``. Ranks split the sequences. Each rank returns the metrics over all sequences.
    Rank 0 also generates text, and writes ``results.json`` to ``out`` with all metrics, the loss of
    each sequence and the generated text.
    """
    text = read_sequences(data, "heldout", cfg.seq_length, cfg.num_sequences)
    _require_text_for_ranks(cfg, text)
    if world_size() > 1:
        nemo.initialize(nemo.Parallelism())
    rank_text = text[rank() :: world_size()]
    tokenizer_folder = nemo.side_folder(checkpoints[TEACHER])
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
    generations = _examples(cfg, text)  # tokens; each model's continuations are added below
    states: dict[str, FinalStates] = {}
    parameters = {}

    def progress(done: int) -> None:
        """Reports the sequences that are done, including those of models already in ``states``."""
        done_earlier = len(states) * len(rank_text)
        log.progress("evaluate", done_earlier + done, len(checkpoints) * len(rank_text))

    for role, path in checkpoints.items():
        model = load_transformers(path, dtype_of(cfg.precision))
        states[role] = compute_states(
            Predictor.of(model), rank_text, cfg.micro_batch_size, progress
        )
        parameters[role] = sum(p.numel() for p in model.parameters())
        if rank() == 0 and len(prompts := generations["prompt"]):
            generations[role] = _generate(cfg, model, prompts, tokenizer.eos_token_id)
        del model  # before the next model is loaded
    metrics = compare_predictions(states, rank_text)
    rank_scores = {role: Scores.of(values, rank_text) for role, values in metrics.items()}
    scores = _gather_scores(rank_scores)
    results = {
        # ``ModelQuality`` has the fields of ``TextQuality``, which ``quality()`` returns.
        role: ModelQuality(**vars(role_scores.quality()), parameters=parameters[role])
        for role, role_scores in scores.items()
    }
    if rank() == 0:
        texts = {name: list(map(tokenizer.decode, rows)) for name, rows in generations.items()}
        _write_details(out / "results.json", results, scores, texts)
    return EvaluationResult(
        **results,
        sequences=len(text),
        tokens=text.tokens.numel(),
        predictions=text.predictions,
        precision=cfg.precision,
        recovered=_recovered(scores),
        sources=_by_source(scores, text) if len(text.sources) > 1 else {},
    )


def _require_text_for_ranks(cfg: EvaluateConfig, text: TextSequences) -> None:
    """Raises ``RecipeError`` if a rank would get no sequence."""
    if len(text) < world_size():
        raise RecipeError(
            f"the held-out text has {len(text)} sequences of {cfg.seq_length} tokens, but "
            f"{cfg.name} has {world_size()} ranks",
            f"set stages.{cfg.name}.resources.devices={max(1, len(text))} and resources.nodes=1, "
            "or hold out more text: heldout_fraction of the stage that prepares it",
        )


def _examples(cfg: EvaluateConfig, text: TextSequences) -> dict[str, Tensor]:
    """Returns the tokens of prompts and of their original continuations.

    Takes ``num_generations`` sequences that are spaced evenly over the text.
    """
    stride = max(1, len(text) // max(1, cfg.num_generations))
    examples = text.tokens[::stride][: cfg.num_generations]
    end = cfg.prompt_tokens + cfg.new_tokens
    return {
        "prompt": examples[:, : cfg.prompt_tokens],
        "text": examples[:, cfg.prompt_tokens : end],
    }


def _write_details(
    path: Path,
    results: Mapping[str, ModelQuality],
    scores: Mapping[str, Scores],
    texts: Mapping[str, Sequence[str]],
) -> None:
    """Writes each role's results and sequence losses, and each prompt with its continuations.

    ``texts`` has a list with one text per prompt for each of these keys: ``prompt``, ``text`` (the
    original continuation), and the roles (the models' continuations).
    """
    details = {
        "results": {role: asdict(quality) for role, quality in results.items()},
        "sequence_losses": {role: role_scores.losses for role, role_scores in scores.items()},
        # One dict per prompt, with the keys of ``texts``.
        "generations": [
            dict(zip(texts, values, strict=True)) for values in zip(*texts.values(), strict=True)
        ],
    }
    write_text_atomically(path, json_text(details, indent=1, ensure_ascii=False))


@dataclass
class Scores:
    """A model's metrics by sequence: means over the predictions that count in the loss.

    The fields are those of ``PredictionMetrics``, in the same order.
    """

    losses: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, metrics: PredictionMetrics, text: TextSequences) -> Scores:
        """Computes the mean of each metric for each sequence of a text."""
        counts = text.prediction_mask.sum(dim=1).tolist()  # predictions of each sequence
        means = (  # one list per field
            [sequence.mean().item() for sequence in values.split(counts)]
            for values in vars(metrics).values()
        )
        return cls(*means)

    def __add__(self, other: Scores) -> Scores:
        """Returns the scores of the sequences of ``self``, followed by those of ``other``."""
        return Scores(*(values + vars(other)[name] for name, values in vars(self).items()))

    def quality(self, span: slice = slice(None)) -> TextQuality:
        """Returns the means over a range of sequences; by default over all."""
        losses = self.losses[span]
        return TextQuality(
            loss=fmean(losses),
            loss_standard_error=standard_error(losses),
            perplexity=perplexity(fmean(losses)),
            kl_to_teacher=fmean(self.divergences[span]),
            top1_agreement=fmean(self.agreements[span]),
        )


def _gather_scores(scores: dict[str, Scores]) -> dict[str, Scores]:
    """Returns the scores of all ranks, by role, in the order of the text's sequences.

    ``scores`` maps roles to this rank's scores. Rank r of n has the sequences r, r + n, r + 2n and
    so on.
    """
    by_rank = gather(scores)

    def in_order(role: str, metric: str) -> list[float]:
        # A row has one value of each rank. In the last row, the last ranks may have no value.
        rows = zip_longest(*(vars(rank_scores[role])[metric] for rank_scores in by_rank))
        return [value for row in rows for value in row if value is not None]

    metrics = [item.name for item in fields(Scores)]
    return {role: Scores(*(in_order(role, metric) for metric in metrics)) for role in scores}


def score(
    models: Mapping[str, Predictor], text: TextSequences, log: MetricsLog
) -> dict[str, Scores]:
    """Compares models with the teacher on one sequence at a time, with all models in memory.

    ``models`` maps roles, including ``TEACHER``, to models. Returns the scores of each role.
    """
    scores = {role: Scores() for role in models}
    for index in range(len(text)):
        sequence = text[index : index + 1]
        states = {role: compute_states(model, sequence, 1) for role, model in models.items()}
        for role, metrics in compare_predictions(states, sequence).items():
            scores[role] += Scores.of(metrics, sequence)
        log.progress("evaluate", index + 1, len(text))
    return scores


def token_quality(teacher: FinalStates, student: FinalStates, text: TextSequences) -> TokenQuality:
    """Compares a student with its teacher, on the text that both ran on."""
    metrics = compare_predictions({TEACHER: teacher, "student": student}, text)["student"]
    loss, kl = (values.double().mean().item() for values in (metrics.losses, metrics.divergences))
    return TokenQuality(perplexity(loss), kl)


def measure_checkpoints(
    teacher: Path,
    students: Iterable[Path],
    text: TextSequences,
    precision: str,
    micro_batch_size: int,
) -> list[TokenQuality]:
    """Compares NeMo checkpoints of students with their teacher, one model in memory at a time.

    Returns the metrics of each student, in the order of ``students``. ``precision`` is that of
    weights and computation. A forward pass has ``micro_batch_size`` sequences.
    """

    def final_states(checkpoint: Path) -> FinalStates:
        model = Predictor.of(load_transformers(checkpoint, dtype_of(precision)))
        states: FinalStates = compute_states(model, text, micro_batch_size)
        return states

    teacher_states = final_states(teacher)
    return [token_quality(teacher_states, final_states(student), text) for student in students]


def _by_source(scores: Mapping[str, Scores], text: TextSequences) -> dict[str, SourceQuality]:
    """Returns the metrics of all models on each source's sequences, by source."""
    return {
        source: SourceQuality(
            **{role: scores[role].quality(span) for role in ROLES},
            sequences=len(text[span]),
            tokens=text[span].tokens.numel(),
            predictions=text[span].predictions,
            recovered=_recovered(scores, span),
        )
        for source, span in text.sources.items()
    }


def _recovered(scores: Mapping[str, Scores], span: slice = slice(None)) -> float | None:
    """Returns ``recovered`` for the losses on a range of sequences; by default on all."""
    # Losses are negated, because ``recovered`` expects values where higher is better.
    return recovered(*([-loss for loss in scores[role].losses[span]] for role in ROLES))


def load_transformers(checkpoint: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Loads a NeMo checkpoint as a transformers model, on the GPU if there is one."""
    config = AutoConfig.from_pretrained(nemo.side_folder(checkpoint), trust_remote_code=False)
    # Without this field, transformers assumes hidden_size / heads, which is wrong after pruning.
    config.head_dim = nemo.architecture_of(checkpoint).kv_channels
    return with_weights(config, convert.hf_weights(checkpoint), dtype)


def with_weights(
    config: PretrainedConfig, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> PreTrainedModel:
    """Builds a transformers model from named weights, on the GPU if there is one.

    The weights are converted to ``dtype``. Raises ``ValueError`` if they do not match the config.
    """
    gc.collect()  # frees an earlier model, which reference cycles may keep in memory
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    missing, unexpected = model.load_state_dict(dict(weights), strict=False)
    model.tie_weights()
    # A tied head uses the embedding's weight, so ``weights`` need not have one for the head.
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if unexpected or set(missing) - optional:
        raise ValueError(
            f"weights do not match the {config.model_type} config: missing {missing}, "
            f"unexpected {unexpected}"
        )
    model_for_inference: PreTrainedModel = model.to(device()).eval()
    return model_for_inference


def model_sha256(model: torch.nn.Module, checkpoint: Path) -> str:
    """Returns a hash of a loaded model's weights, and of other files of its NeMo checkpoint.

    These files are the tokenizer, config.json and the generation settings.
    """
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # A view as bytes, because NumPy has no bfloat16.
        weights.update(tensor.contiguous().view(torch.uint8).cpu().numpy().data)
    folder = nemo.side_folder(checkpoint)
    generation = folder / GENERATION_CONFIG
    return digest(
        {
            "weights": weights.hexdigest(),
            "config": nemo.read_config(checkpoint),
            "generation": read_json(generation) if generation.exists() else None,
            "tokenizer": tokenizer_sha256(folder),
        }
    )


def _generate(
    cfg: EvaluateConfig, model: PreTrainedModel, prompts: Tensor, pad_token: int
) -> Tensor:
    """Continues prompts [n, prompt_tokens] greedily.

    Returns the new tokens, [n, at most new_tokens]. Continuations that end earlier than others are
    padded with ``pad_token``.
    """
    output: Tensor = model.generate(
        prompts.to(model.device),
        attention_mask=torch.ones_like(prompts, device=model.device),
        max_new_tokens=cfg.new_tokens,
        do_sample=False,
        pad_token_id=pad_token,
    )
    return output[:, cfg.prompt_tokens :]
