"""Tokenizes text into Megatron's ``.bin/.idx`` files.

Reads the sources and the imported model's tokenizer. Writes four splits (train, validation,
calibration, heldout) that share no document.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_convert.hub import HUB_SECONDS, has_chat_template, local_folder
from nemo_convert.licences import forbids_commercial_use
from nemo_convert.results import ImportResult
from nemo_convert.tokenizer_files import read_special_token, read_vocabulary
from recipes.core.errors import RecipeError
from recipes.core.files import link_or_copy, sha256_of
from recipes.core.manifest import Outcome
from recipes.core.precision import dtype_of
from recipes.core.stage import Input, Inputs, metrics_log, rank
from recipes.core.wheels import short_name
from recipes.data.checks import prefix_problems, source_problems
from recipes.data.corpus import SPLITS, TOKEN_BYTES
from recipes.data.origins import known_licences, origins_of, pin_commit
from recipes.data.results import DatasetResult, Origin, SourceTokens, describe_counts
from recipes.data.settings import PrepareDataConfig
from recipes.data.sources import parse_source, with_option
from recipes.data.token_files import (
    SAMPLED_TOKENS,
    open_token_files,
    paths_of,
    require_document_end,
    require_valid,
    split_ranges,
    write_split,
)
from recipes.planning import rules
from recipes.planning.chain import Chain, sequence_problems
from recipes.planning.limits import source_tokens
from recipes.planning.rules import Problem
from recipes.stages.contract import Stage

if TYPE_CHECKING:
    from recipes.data.preparation import PreparationState
    from recipes.data.tokenizer import DocumentTokenizer

SEED = 1234
"""Default seed for conversations that the teacher writes."""
SPLITS_FOLDER = "splits"
"""Folder in ``work/`` with unfinished splits, from which a killed stage resumes."""
MIN_PROGRESS_TOKENS = 10_000_000
"""Unfinished work with fewer tokens may be deleted when a setting changes, because one process
tokenizes them again in about half a minute."""


def external(cfg: PrepareDataConfig) -> dict[str, Path]:
    """Returns the local files, and folders of ``hf://`` sources, that the result depends on."""
    sources = [parse_source(source) for source in cfg.all_sources()]
    paths = [path for source in sources for path in source.local_files()]
    hub_names = [Path(source.hub.name) for source in sources if source.hub]
    paths += filter(Path.is_dir, hub_names)  # ``hf://`` sources may be local folders
    if cfg.prefix:
        paths += paths_of(cfg.prefix_path).values()
    return {str(path.absolute()): path for path in paths}


def check(cfg: PrepareDataConfig, chain: Chain) -> Iterator[Problem]:
    """Yields problems of sources, splits and conversations, without reading whole files."""
    vocabulary, eos_token = _read_tokenizer(chain) if cfg.document_end or cfg.prefix else ({}, None)
    prefix = prefix_problems(cfg, vocabulary, eos_token)
    for what, fix in (*source_problems(cfg), *prefix, *_leak_problems(cfg, chain)):
        yield Problem(rules.DATA_SOURCES, what, fix)
    for source, licence in known_licences(tuple(cfg.texts()), HUB_SECONDS).items():
        if licence is None and parse_source(source).hub:  # expected only of hub sources
            fix = f"state it: {with_option(source, 'licence', 'NAME')}"
            yield Problem(rules.LICENCE, f"the licence of '{source}' is not known", fix)
        if forbids_commercial_use(licence):
            what = f"the licence of '{source}', {licence}, forbids commercial use"
            yield Problem(rules.LICENCE, what, "train on other text for commercial use: data=GROUP")
    if cfg.resources.ranks > 1 and (cfg.teacher_sources() or cfg.prefix):
        what = f"teacher:// sources and data.prefix need one rank, not {cfg.resources.ranks}"
        yield Problem(rules.ONE_RANK, what, "set resources.nodes and resources.devices to 1")
    yield from _chat_problems(cfg, chain)
    if cfg.document_end and vocabulary and cfg.document_end not in vocabulary:
        yield Problem(
            rules.DOCUMENT_END,
            f"data.document_end={cfg.document_end} is not in the tokenizer of {chain.hf_path}",
            "set a token of its vocabulary, or leave it out",
        )
    if (total := sum(cfg.fractions().values())) >= 1:
        yield Problem(
            rules.DATA_SPLITS,
            f"the fractions of validation, calibration and heldout sum to {total:g}",
            "keep the sum well below 1",
        )
    yield from sequence_problems(cfg.seq_length, {}, chain)


def _read_tokenizer(chain: Chain) -> tuple[dict[str, int], str | None]:
    """Returns the vocabulary and ``eos_token`` of the model's tokenizer.

    The vocabulary is empty if the tokenizer is not on this machine, or is invalid.
    """
    folder = local_folder(chain.hf_path)
    if folder is None:
        return {}, None
    try:
        return read_vocabulary(folder), read_special_token(folder, "eos_token")
    except RecipeError:  # the check of ``import_hf`` reports invalid files
        return {}, None


def _leak_problems(cfg: PrepareDataConfig, chain: Chain) -> Iterator[tuple[str, str]]:
    """Yields (what, fix) if documents that the input ``held_out`` holds out could be trained on.

    Held-out documents are recognized by their digests. Only text of a prefix has no digests.
    """
    earlier, later = cfg.inputs.get("held_out", ""), cfg.name  # names of the two stages
    earlier_cfg = chain.stages.get(earlier)
    if not isinstance(earlier_cfg, PrepareDataConfig) or not (cfg.prefix or earlier_cfg.prefix):
        return  # there is no earlier stage in this run, or all documents have digests
    if earlier_cfg.prefix and earlier_cfg.heldout_sources:  # the held-out text has digests
        return
    if not cfg.prefix or not earlier_cfg.prefix:
        yield (
            f"only one of {earlier} and {later} has tokenized text (prefix), so {later} cannot "
            f"leave out the documents that {earlier} holds out",
            "set the prefix for both or for neither; or if their texts share no documents, remove "
            f"the input: '~stages.{later}.inputs.held_out'",
        )
        return
    # If both divide the same files, all settings that affect the split boundaries must be equal.
    keys = ("max_tokens", "max_documents", *(f"{split}_fraction" for split in cfg.fractions()))
    different_keys = [key for key in keys if vars(cfg)[key] != vars(earlier_cfg)[key]]
    if cfg.heldout_sources:  # different, because ``earlier_cfg`` has none
        different_keys.append("heldout_sources")
    data, earlier_data = (paths_of(config.prefix_path)[".bin"] for config in (cfg, earlier_cfg))
    if data.resolve() == earlier_data.resolve() and different_keys:
        what = f"{earlier} and {later} divide data.prefix={cfg.prefix} at different documents"
        fixes = [f"'stages.{later}.{key}=${{stages.{earlier}.{key}}}'" for key in different_keys]
        yield what, f"set {' '.join(fixes)}, or use other text"


def _chat_problems(cfg: PrepareDataConfig, chain: Chain) -> Iterator[Problem]:
    """Checks that the model and the settings fit conversations."""
    chats = cfg.chat_sources()
    if cfg.format == "chat" and set(chats).isdisjoint(cfg.sources):
        yield Problem(
            rules.CHAT,
            "data.format=chat, but '#text=FIELD' makes every training source plain text",
            "give conversations: data.sources=[my.jsonl]",
        )
    if chats and has_chat_template(chain.hf_path) is False:  # ``None`` means unknown
        yield Problem(
            rules.CHAT,
            f"'{chats[0]}' has conversations, but {chain.hf_path} has no chat template",
            "use an instruct model, or plain text: data.format=text",
        )


def disk_bytes(cfg: PrepareDataConfig, chain: Chain) -> int:
    """Returns the bytes of all tokens and of their loss mask, without sources of unknown size."""
    tokens = sum(count for count in source_tokens(cfg).values() if count < math.inf)
    mask_bytes = 1 if cfg.chat_sources() else 0  # only conversations need a loss mask
    return int(tokens) * (TOKEN_BYTES + mask_bytes)


def progress(work: Path) -> str | None:
    """Describes unfinished work by its tokens; ``None`` below ``MIN_PROGRESS_TOKENS``."""
    files = (work / SPLITS_FOLDER).glob("*.bin")
    tokens = sum(file.stat().st_size for file in files) // TOKEN_BYTES
    return f"{tokens:,} tokens" if tokens >= MIN_PROGRESS_TOKENS else None


def run(cfg: PrepareDataConfig, inputs: Inputs, out: Path) -> Outcome:
    """Tokenizes all sources. Documents start and end with the tokenizer's begin and end tokens."""
    from nemo_convert.nemo import find_checkpoint, side_folder
    from recipes.data.chat import ChatTokenizer
    from recipes.data.preparation import EARLIER, HELD_OUT, prepare
    from recipes.data.split_writer import LOSS_MASK
    from recipes.data.token_sequences import warn_of_short_sources
    from recipes.data.tokenizer import broadcast, load_tokenizer

    side_files = side_folder(find_checkpoint(inputs["tokenizer"].artifact))
    tokenizer = load_tokenizer(side_files, cfg.document_end)
    chat_tokenizer = None
    if cfg.chat_sources():
        chat_tokenizer = ChatTokenizer(side_files, tokenizer.end, cfg.seq_length)
        chat_tokenizer.require_template()
    folder = out.parent / SPLITS_FOLDER
    folder.mkdir(exist_ok=True)
    if "held_out" in inputs and rank() == 0:  # digests of documents that ``prepare`` leaves out
        shutil.copyfile(inputs["held_out"].artifact / HELD_OUT, folder / EARLIER)
    # Rank 0 resolves the sources and sends their origins to the other ranks.
    origins: dict[str, Origin] = broadcast(
        origins_of(cfg.all_sources(), folder / "origins.json") if rank() == 0 else None
    )
    pinned_sources = {source: pin_commit(source, origin) for source, origin in origins.items()}
    if cfg.teacher_sources():  # the teacher writes a file for each of these sources
        teacher = inputs["tokenizer"]  # the input is the teacher's whole checkpoint
        for source, (file, origin) in _write_chats(cfg, teacher, out).items():
            pinned_sources[source], origins[source] = file, origin
    prepared = prepare(cfg, tokenizer, folder, metrics_log(out), chat_tokenizer, pinned_sources)
    if rank() != 0:
        return Outcome()
    link_or_copy(folder / HELD_OUT, out / HELD_OUT)
    if cfg.prefix:
        return _link_tokens(cfg, inputs["tokenizer"], tokenizer, prepared, out)
    # ``sizes`` has the bytes and the number of documents of each split.
    tokens = {split: size // TOKEN_BYTES for split, (size, _) in prepared.sizes.items()}
    _require_sequences(tokens, cfg.seq_length, prepared.conversations)
    endings = ("bin", "idx", LOSS_MASK) if chat_tokenizer else ("bin", "idx")
    for name in (f"{split}.{ending}" for split in SPLITS for ending in endings):
        link_or_copy(folder / name, out / name)
    result = DatasetResult(
        documents={split: documents for split, (_, documents) in prepared.sizes.items()},
        tokens=tokens,
        sources=cfg.sources,
        source_tokens={
            split: [SourceTokens(name, count) for name, count in counts.items()]
            for split, counts in prepared.sources.items()
        },
        document_end=tokenizer.end,
        document_begin=tokenizer.begin,
        seq_length=cfg.seq_length if chat_tokenizer else None,
        conversations=prepared.conversations,
        origins=origins,
    )
    warn_of_short_sources(cfg, result.source_tokens)
    return Outcome(result, tokenizer_sha256=inputs["tokenizer"].manifest.tokenizer_sha256)


def _link_tokens(
    cfg: PrepareDataConfig,
    model: Input,
    tokenizer: DocumentTokenizer,
    prepared: PreparationState,
    out: Path,
) -> Outcome:
    """Divides the tokens of the files ``data.prefix`` into splits that link to these files.

    With ``heldout_sources``, the held-out split has these sources instead. ``prepare`` has already
    tokenized them; ``prepared`` has their counts.
    """
    from recipes.data.token_sequences import warn_of_short_sources

    files, log = open_token_files(cfg.prefix_path), metrics_log(out)
    require_valid(files, tokenizer.size, partial(log.progress, "check"))
    # The user can see from the sample whether this tokenizer wrote the files.
    sample = tokenizer.decode(files.tokens[:SAMPLED_TOKENS].tolist())
    print(f"{cfg.prefix_path} starts with: {sample!r}", flush=True)
    all_documents_end = require_document_end(
        files.prefix, tokenizer.end, lambda token: tokenizer.decode([token])
    )
    if not all_documents_end:
        print("warning: not all documents end with the tokenizer's end of text", flush=True)
    fractions = cfg.fractions()
    if cfg.heldout_sources:
        fractions.pop("heldout")
    ranges = split_ranges(files, fractions, cfg.max_documents, cfg.max_tokens)
    tokens = {split: write_split(files, indices, out / split) for split, indices in ranges.items()}
    name = cfg.prefix_path.name
    sources = {split: [SourceTokens(name, count)] for split, count in tokens.items()}
    documents = {split: len(indices) for split, indices in ranges.items()}
    if cfg.heldout_sources:
        for suffix in (".bin", ".idx"):
            link_or_copy(out.parent / SPLITS_FOLDER / f"heldout{suffix}", out / f"heldout{suffix}")
        size, documents["heldout"] = prepared.sizes["heldout"]
        tokens["heldout"] = size // TOKEN_BYTES
        held_out = prepared.sources["heldout"]
        sources["heldout"] = [SourceTokens(source, count) for source, count in held_out.items()]
    _require_sequences(tokens, cfg.seq_length, {})
    result = DatasetResult(
        documents=documents,
        tokens=tokens,
        sources=cfg.texts(),
        source_tokens=sources,
        origins={text: Origin(parse_source(text).licence) for text in cfg.texts()},
        document_end=tokenizer.end,
        document_begin=tokenizer.begin,
        sample=sample,
    )
    warn_of_short_sources(cfg, result.source_tokens)
    return Outcome(result, tokenizer_sha256=model.manifest.tokenizer_sha256)


def _write_chats(
    cfg: PrepareDataConfig, teacher: Input, out: Path
) -> dict[str, tuple[str, Origin]]:
    """Lets the teacher write conversations; returns file and origin by ``teacher://`` source."""
    from transformers import AutoTokenizer

    from nemo_convert.nemo import find_checkpoint, side_folder
    from recipes.data.teacher_chats import ChatRequest, ChatWriter, write_chats
    from recipes.evaluation.text_quality import load_transformers, model_sha256

    checkpoint = find_checkpoint(teacher.artifact)
    model = load_transformers(checkpoint, dtype_of(cfg.precision))
    tokenizer = AutoTokenizer.from_pretrained(side_folder(checkpoint), trust_remote_code=False)
    writer = ChatWriter(model, tokenizer, model_sha256(model, checkpoint))
    imported = teacher.manifest.result_if("import_hf", ImportResult)
    licence = imported.licence if imported else "unknown"
    name = short_name(teacher.manifest.config.get("hf_path", teacher.directory.name))
    licence_note = f"written by {name}; its licence applies: {licence}"
    files = {}
    for source_text in cfg.teacher_sources():
        source = parse_source(source_text)
        request = ChatRequest(
            tokens=int(source.tokens or cfg.max_tokens or 0),  # ``check`` requires one of the two
            seed=int(source.seed or SEED),
            seq_length=cfg.seq_length,
            prompts=source.prompts,
        )
        file = write_chats(request, writer, metrics_log(out))
        origin = Origin(source.licence or licence_note, sha256=sha256_of(file))
        files[source_text] = (str(file), origin)
    return files


def _require_sequences(
    tokens: Mapping[str, int], seq_length: int, conversations: Mapping[str, Mapping[str, int]]
) -> None:
    """Raises ``RecipeError`` unless each split has more tokens than one sequence.

    ``conversations`` has each source's counts of used and rejected ones, for the message.
    """
    short_splits = [f"{split}: {tokens[split]}" for split in SPLITS if tokens[split] <= seq_length]
    if short_splits:
        counts = "".join(f" Of {name}, {describe_counts(n)}." for name, n in conversations.items())
        splits = ", ".join(short_splits)
        raise RecipeError(
            f"too little text for seq_length={seq_length}; tokens in {splits}.{counts}",
            "give more text, or set data.seq_length lower",
        )


STAGE = Stage(
    config=PrepareDataConfig,
    kind="dataset",
    run=run,
    check=check,
    inputs={"tokenizer": ("checkpoint_nemo",)},
    optional_inputs={"held_out": ("dataset",)},  # its held-out documents are held out here, too
    needs_gpu=lambda config, chain: bool(config.teacher_sources()),
    external=external,
    disk_bytes=disk_bytes,
    progress=progress,
    resolve_from_chain=lambda config, chain: config.without_weights(),
)
