"""Text to Megatron's ``.bin/.idx``, in four parts that share no document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from recipes.core.errors import RecipeError
from recipes.core.manifest import Outcome
from recipes.core.stage import Inputs, metrics_log
from recipes.data import corpus
from recipes.data.results import DatasetResult, SourceTokens
from recipes.data.settings import PrepareDataConfig
from recipes.planning import rules
from recipes.planning.chain import Chain, window_problems
from recipes.planning.problems import Problem
from recipes.stages.contract import Stage

BATCH = 512
"""Documents tokenized at a time."""


def external(cfg: PrepareDataConfig) -> dict[str, Path]:
    """Local files that the result depends on."""
    return {source: Path(source) for source in cfg.sources if Path(source).is_file()}


def check(cfg: PrepareDataConfig, chain: Chain) -> Iterator[Problem]:
    """Finds sources that cannot work, without reading them."""
    if not cfg.sources:
        yield Problem(rules.DATA_SOURCES, "no text is given", "set data.sources")
    for source in cfg.sources:
        if problem := corpus.source_problem(source):
            yield Problem(rules.DATA_SOURCES, f"data.sources: {problem}", "fix data.sources")
    if min(cfg.fractions().values()) <= 0 or sum(cfg.fractions().values()) >= 1:
        yield Problem(
            rules.DATA_PARTS,
            "fractions of validation, calibration and heldout must be positive and leave a rest",
            "keep them well below 1 in total",
        )
    yield from window_problems(cfg.seq_length, chain)


def run(cfg: PrepareDataConfig, inputs: Inputs, out: Path) -> Outcome:
    """Tokenizes all sources, each document with the marks of its beginning and end."""
    from nemo_convert.nemo import find_checkpoint, side_files
    from recipes.data.token_windows import PartWriter
    from recipes.data.tokenizer import load_tokenizer

    side = side_files(find_checkpoint(inputs["tokenizer"].artifact))
    tokenizer = load_tokenizer(side, cfg.document_end)
    log = metrics_log(out)
    documents: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    heldout: Counter[str] = Counter()
    seen: set[str] = set()
    fractions = cfg.fractions()
    with PartWriter(out, corpus.PARTS) as writer:
        for name, source in corpus.source_names(cfg.sources).items():
            taken = list(_unique(cfg, source, seen))
            for start in range(0, len(taken), BATCH):
                batch = taken[start : start + BATCH]
                for text, ids in zip(batch, tokenizer.encode(batch), strict=True):
                    part = corpus.part_of(text, fractions)
                    writer.add(part, ids)
                    documents[part] += 1
                    tokens[part] += len(ids)
                    heldout[name] += len(ids) * (part == "heldout")
                log.progress("tokenize", start + len(batch), len(taken), source=source)
    _require_windows(tokens, cfg.seq_length)
    return Outcome(
        DatasetResult(
            dict(documents),
            dict(tokens),
            cfg.sources,
            [SourceTokens(name, n) for name, n in heldout.items()],
            tokenizer.begin,
            tokenizer.end,
        ),
        tokenizer_sha256=inputs["tokenizer"].manifest.tokenizer_sha256,
    )


def _unique(cfg: PrepareDataConfig, source: str, seen: set[str]) -> Iterator[str]:
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


STAGE = Stage(
    config=PrepareDataConfig,
    kind="dataset",
    run=run,
    check=check,
    one_rank="its files are written by one process",
    inputs={"tokenizer": ("checkpoint_nemo",)},
    needs_gpu=lambda config, chain: False,
    external=external,
)

if __name__ == "__main__":
    STAGE.main()
