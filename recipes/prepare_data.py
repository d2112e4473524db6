"""Text to Megatron's ``.bin/.idx``, in four parts that share no document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from recipes import corpus
from recipes.errors import RecipeError
from recipes.manifest import Outcome
from recipes.preflight import Chain, Problem, one_rank_problems, window_problems
from recipes.stage import Inputs, StageConfig, metrics_log, stage_main

KIND = "dataset"
INPUTS = {"tokenizer": "checkpoint_nemo"}
BATCH = 512
"""Documents tokenized at a time."""


@dataclass
class Config(StageConfig):
    """Settings of ``prepare_data``."""

    sources: list[str] = field(default_factory=list)
    """Files (.txt, .json, .jsonl), ``hf://NAME[@CONFIG]:SPLIT`` or ``pypi://`` sources."""
    text_field: str = "text"
    validation_fraction: float = 0.02
    calibration_fraction: float = 0.04
    heldout_fraction: float = 0.04
    max_documents: int | None = None
    """Documents to take from each source; all by default."""
    seq_length: int = 256
    """Every part must hold at least one window of this many tokens."""

    def fractions(self) -> dict[str, float]:
        """Share of documents in each part except ``train``, which takes the rest."""
        return {p: getattr(self, f"{p}_fraction") for p in corpus.PARTS if p != "train"}


def external(cfg: Config) -> dict[str, Path]:
    """Local files that the result depends on."""
    return {source: Path(source) for source in cfg.sources if Path(source).is_file()}


def check(cfg: Config, chain: Chain) -> Iterator[Problem]:
    """Finds sources that cannot work, without reading them."""
    if not cfg.sources:
        yield Problem("data-sources", "no text is given", "set data.sources")
    for source in cfg.sources:
        if problem := corpus.source_problem(source):
            yield Problem("data-sources", f"data.sources: {problem}", "fix data.sources")
    if min(cfg.fractions().values()) <= 0 or sum(cfg.fractions().values()) >= 1:
        yield Problem(
            "data-parts",
            "fractions of validation, calibration and heldout must be positive and leave a rest",
            "keep them well below 1 in total",
        )
    yield from window_problems(cfg.seq_length, chain)
    yield from one_rank_problems(cfg, "its files are written by one process")


def run(cfg: Config, inputs: Inputs, out: Path) -> Outcome:
    """Tokenizes all sources; each document ends with the end-of-text token."""
    from nemo_convert.nemo import find_checkpoint, side_files
    from recipes.indexed_dataset import PartWriter, load_tokenizer

    side = side_files(find_checkpoint(inputs["tokenizer"].artifact))
    encode, eos = load_tokenizer(side)
    log = metrics_log(out)
    documents: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    heldout: Counter[str] = Counter()
    seen: set[str] = set()
    with PartWriter(out, corpus.PARTS) as writer:
        for name, source in corpus.source_names(cfg.sources).items():
            taken = list(_unique(cfg, source, seen))
            for start in range(0, len(taken), BATCH):
                batch = taken[start : start + BATCH]
                for text, ids in zip(batch, encode(batch), strict=True):
                    part = corpus.part_of(text, cfg.fractions())
                    writer.add(part, [*ids, eos])
                    documents[part] += 1
                    tokens[part] += len(ids) + 1
                    heldout[name] += (len(ids) + 1) * (part == "heldout")
                log.progress("tokenize", start + len(batch), len(taken), source=source)
    _require_windows(tokens, cfg.seq_length)
    return Outcome(
        metrics={
            "documents": dict(documents),
            "tokens": dict(tokens),
            "sources": cfg.sources,
            # A list, since sources lie in the part in this order and a manifest sorts its keys.
            "heldout_sources": [{"source": name, "tokens": n} for name, n in heldout.items()],
        },
        tokenizer_sha256=inputs["tokenizer"].manifest.tokenizer_sha256,
    )


def _unique(cfg: Config, source: str, seen: set[str]) -> Iterator[str]:
    """Documents of a source, without those seen before in any source."""
    for number, text in enumerate(corpus.read_documents(source, cfg.text_field)):
        if cfg.max_documents is not None and number >= cfg.max_documents:
            return
        if text not in seen:
            seen.add(text)
            yield text


def _require_windows(tokens: Counter[str], seq_length: int) -> None:
    short = [f"{part}: {tokens[part]}" for part in corpus.PARTS if tokens[part] <= seq_length]
    if short:
        raise RecipeError(
            f"too little text for seq_length={seq_length}; tokens in {', '.join(short)}.",
            "give more text, or set data.seq_length lower",
        )


if __name__ == "__main__":
    stage_main(run, Config, KIND)
