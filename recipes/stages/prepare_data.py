"""Text to Megatron's ``.bin/.idx``, in four parts that share no document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from nemo_convert.hub import has_chat_template
from nemo_convert.results import ImportResult
from recipes.core.errors import RecipeError
from recipes.core.files import link_or_copy, sha256_of
from recipes.core.manifest import Outcome
from recipes.core.precision import dtype_of
from recipes.core.stage import Input, Inputs, metrics_log
from recipes.core.wheels import short_name
from recipes.data.corpus import PARTS, chat_problem
from recipes.data.origins import origins_of, pinned
from recipes.data.results import DatasetResult, Origin, SourceTokens, in_words
from recipes.data.settings import PrepareDataConfig
from recipes.data.sources import parse_source, source_problem, with_option
from recipes.planning import rules
from recipes.planning.chain import Chain, window_problems
from recipes.planning.problems import Problem
from recipes.stages.contract import Stage

SEED = 1234
"""Of a teacher's conversations whose source has no seed."""
PARTS_FOLDER = "parts"
"""Folder in ``work/`` that a killed process goes on from."""


def external(cfg: PrepareDataConfig) -> dict[str, Path]:
    """Local files that the result depends on."""
    found = (parse_source(source).local_files() for source in cfg.all_sources())
    return {str(path): path for files in found for path in files}


def check(cfg: PrepareDataConfig, chain: Chain) -> Iterator[Problem]:
    """Finds sources that cannot work, without reading them."""
    if not cfg.sources:
        yield Problem(rules.DATA_SOURCES, "no text is given", "set data.sources")
    for source in cfg.all_sources():
        if problem := source_problem(source):
            yield Problem(
                rules.DATA_SOURCES,
                f"data.sources: {problem}",
                "correct it; docs/your_model.md lists what a source may be",
            )
    for source in cfg.teacher_sources():
        if not (parse_source(source).tokens or cfg.max_tokens):
            yield Problem(
                rules.DATA_SOURCES,
                f"'{source}' does not say how many tokens the teacher writes",
                f"for example {with_option(source, 'tokens', 100000)}",
            )
    for source in set(cfg.sources) & set(cfg.heldout_sources):
        yield Problem(
            rules.DATA_SOURCES,
            f"'{source}' is to be trained on and held out",
            "take it from data.sources or from data.heldout_sources",
        )
    yield from _chat_problems(cfg, chain)
    if sum(cfg.fractions().values()) >= 1:
        yield Problem(
            rules.DATA_PARTS,
            "fractions of validation, calibration and heldout leave nothing to train on",
            "keep them well below 1 in total",
        )
    yield from window_problems(cfg.seq_length, chain)


def _chat_problems(cfg: PrepareDataConfig, chain: Chain) -> Iterator[Problem]:
    """Finds conversations that cannot be rendered, from the beginnings of their files."""
    chats = cfg.chats()
    if cfg.format == "chat" and not set(chats) & set(cfg.sources):
        yield Problem(
            rules.CHAT,
            "data.format=chat, but every source to train on is text by its '#text=FIELD'",
            "give conversations: data.sources=[my.jsonl]",
        )
    if chats and has_chat_template(chain.hf_path) is False:
        yield Problem(
            rules.CHAT,
            f"{chain.hf_path} has no chat template, and '{chats[0]}' is of conversations",
            "use an instruct model, or plain text: data.format=text",
        )
    for source in chats:
        if problem := chat_problem(source):
            yield Problem(rules.CHAT, *problem)


def run(cfg: PrepareDataConfig, inputs: Inputs, out: Path) -> Outcome:
    """Tokenizes all sources, each document with the marks of its beginning and end."""
    from nemo_convert.nemo import find_checkpoint, side_files
    from recipes.data.chat import ChatTokenizer
    from recipes.data.part_writer import LEARNT
    from recipes.data.preparation import prepare
    from recipes.data.tokenizer import load_tokenizer

    side = side_files(find_checkpoint(inputs["tokenizer"].artifact))
    tokenizer = load_tokenizer(side, cfg.document_end)
    chat = ChatTokenizer(side, tokenizer.end, cfg.seq_length) if cfg.chats() else None
    if chat:
        chat.require_template()
    folder = out.parent / PARTS_FOLDER
    folder.mkdir(exist_ok=True)
    origins = origins_of(cfg.all_sources(), folder / "origins.json")
    places = {source: pinned(source, origin) for source, origin in origins.items()}
    if cfg.teacher_sources():
        for source, (file, origin) in _write_chats(cfg, inputs["tokenizer"], out).items():
            places[source], origins[source] = file, origin
    done = prepare(cfg, tokenizer, folder, metrics_log(out), chat, places)
    tokens = {part: size // 4 for part, (size, _) in done.sizes.items()}
    _require_windows(tokens, cfg.seq_length, done.conversations)
    endings = ("bin", "idx", LEARNT) if chat else ("bin", "idx")
    for name in (f"{part}.{ending}" for part in PARTS for ending in endings):
        link_or_copy(folder / name, out / name)
    return Outcome(
        DatasetResult(
            documents={part: documents for part, (_, documents) in done.sizes.items()},
            tokens=tokens,
            sources=cfg.sources,
            source_tokens={
                part: [SourceTokens(name, n) for name, n in of_part.items()]
                for part, of_part in done.sources.items()
            },
            document_end=tokenizer.end,
            document_begin=tokenizer.begin,
            seq_length=cfg.seq_length if chat else None,
            conversations=done.conversations,
            origins=origins,
        ),
        tokenizer_sha256=inputs["tokenizer"].manifest.tokenizer_sha256,
    )


def _write_chats(
    cfg: PrepareDataConfig, teacher: Input, out: Path
) -> dict[str, tuple[str, Origin]]:
    """Lets the teacher write its sources; returns the file and origin of each."""
    from transformers import AutoTokenizer

    from nemo_convert.nemo import find_checkpoint, side_files
    from recipes.data.teacher_chats import ChatRequest, ChatWriter, write_chats
    from recipes.evaluation.text_quality import load_transformers, model_sha256

    checkpoint = find_checkpoint(teacher.artifact)
    side = side_files(checkpoint)
    model = load_transformers(checkpoint, dtype_of(cfg.precision))
    writer = ChatWriter(
        model,
        AutoTokenizer.from_pretrained(side, trust_remote_code=False),
        model_sha256(model, checkpoint),
    )
    imported = teacher.manifest.result_if("import_hf", ImportResult)
    licence = imported.licence if imported else "unknown"
    name = short_name(teacher.manifest.config.get("hf_path", teacher.directory.name))
    note = f"written by {name}; its licence applies: {licence}"
    files = {}
    for text in cfg.teacher_sources():
        source = parse_source(text)
        request = ChatRequest(
            int(source.tokens or cfg.max_tokens or 0),
            int(source.seed or SEED),
            cfg.seq_length,
            source.prompts,
        )
        file = write_chats(request, writer, metrics_log(out))
        files[text] = (str(file), Origin(source.licence or note, sha256=sha256_of(file)))
    return files


def _require_windows(
    tokens: Mapping[str, int], seq_length: int, conversations: Mapping[str, Mapping[str, int]]
) -> None:
    short = [f"{part}: {tokens[part]}" for part in PARTS if tokens[part] <= seq_length]
    if short:
        became = "".join(f" Of {name}, {in_words(n)}." for name, n in conversations.items())
        raise RecipeError(
            f"too little text for seq_length={seq_length}; tokens in {', '.join(short)}.{became}",
            "give more text, or set data.seq_length lower",
        )


STAGE = Stage(
    config=PrepareDataConfig,
    kind="dataset",
    run=run,
    check=check,
    one_rank="its files are written by one process; set processes instead",
    inputs={"tokenizer": ("checkpoint_nemo",)},
    needs_gpu=lambda config, chain: bool(config.teacher_sources()),
    external=external,
)

if __name__ == "__main__":
    STAGE.main()
