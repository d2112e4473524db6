"""Finds problems in the settings of ``prepare_data`` without reading whole files.

Does not import torch or NumPy, because login nodes do not have them.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice

from recipes.core.errors import RecipeError
from recipes.data.corpus import RECORD_TYPES, read_source
from recipes.data.records import FILES_WITH_FIELDS
from recipes.data.settings import PrepareDataConfig, default_document_end
from recipes.data.sources import DIALOGUE, Source, parse_source, source_problem, with_option
from recipes.data.token_files import require_document_end, require_first_tokens, require_token_files

CHECKED_RECORDS = 100
"""``first_records_problem`` checks this number of records, or of text files, of a source."""
CHECKED_BYTES = 1 << 16
"""Bytes at the start of a text file whose encoding ``first_records_problem`` checks."""
PYARROW_TYPES = (".jsonl.zst", ".parquet")
"""Types of files that are read with pyarrow."""


def source_problems(cfg: PrepareDataConfig) -> Iterator[tuple[str, str]]:
    """Yields what is wrong with the sources, each with a fix."""
    if not cfg.sources and not cfg.prefix:
        yield "data.sources is empty", "set data.sources"
    for source in cfg.all_sources():
        chat = cfg.is_chat(source)
        if problem := source_problem(source):
            yield f"data.sources: {problem}", "docs/your_model.md lists sources and their options"
        elif records_problem := first_records_problem(source, cfg.text_field, chat=chat):
            yield records_problem
    yield from _weight_problems(cfg)
    for source in cfg.teacher_sources():
        if not (parse_source(source).tokens or cfg.max_tokens):
            fix = f"for example {with_option(source, 'tokens', 100000)}"
            yield f"'{source}' sets no number of tokens", fix
    yield from _repetitions(cfg)


def _repetitions(cfg: PrepareDataConfig) -> Iterator[tuple[str, str]]:
    """Yields a problem and a fix for each source that repeats an earlier one."""
    earlier_texts: set[Source] = set()
    for source in cfg.all_sources():
        # Sources that differ only in these options contain the same text.
        text = replace(parse_source(source), name=None, licence=None, weight=None, tokens=None)
        if text in earlier_texts:
            what = f"'{source}' is listed twice in data.sources and data.heldout_sources"
            yield what, "remove one of the two entries"
        earlier_texts.add(text)


def first_records_problem(
    source: str, text_field: str, *, chat: bool, strict: bool = False
) -> tuple[str, str] | None:
    """Returns what is wrong with the first records of a source, and the fix.

    Checks whether this type of file can hold conversations. Also checks the first records of a file
    on this machine. For a source that the teacher writes, checks the file with prompts.

    ``text_field`` is the field with a record's text, and ``chat`` says whether all records must be
    conversations. If ``strict``, all conversations must be usable; otherwise, at least one.
    """
    parsed = parse_source(source)
    if parsed.prompts:
        return first_records_problem(parsed.prompts, text_field, chat=True, strict=True)
    if parsed.hub or parsed.by_teacher:
        return None
    if (chat or parsed.format == DIALOGUE) and parsed.file_type not in RECORD_TYPES:
        types = " or ".join(RECORD_TYPES)
        fix = f"give {types}; for plain text, leave out #format and set data.format=text"
        return f"'{parsed.path}' has no conversations", fix
    if parsed.file_type not in FILES_WITH_FIELDS:  # plain text, which may be one huge record
        return _encoding_problem(parsed)
    # A login node does not have pyarrow.
    is_readable = parsed.file_type not in PYARROW_TYPES or find_spec("pyarrow") is not None
    if not (is_readable and parsed.local_files()):  # a wheel has no local files
        return None
    try:
        reader = read_source(source, text_field, chat=chat, leave_out=not strict)
        texts = [document.text for document in islice(reader, CHECKED_RECORDS)]
        if chat and texts and all(isinstance(json.loads(text), dict) for text in texts):
            # Each text is ``{LEFT_OUT: reason}``. Without ``leave_out``, the first raises an error.
            next(iter(read_source(source, text_field, chat=True)))
    except RecipeError as error:
        return error.what, error.fix
    return None


def _encoding_problem(source: Source) -> tuple[str, str] | None:
    """Returns what is wrong with the encoding of the first text files, and the fix."""
    for path in source.local_files()[:CHECKED_RECORDS]:
        with path.open("rb") as file:
            start = file.read(CHECKED_BYTES)
        try:
            # Unlike ``bytes.decode``, accepts a last character that is incomplete.
            codecs.getincrementaldecoder("utf-8")().decode(start)
        except UnicodeDecodeError as error:
            is_utf_16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            encoding = "UTF-16" if is_utf_16 else "not in UTF-8"
            what = f"{path} is {encoding}: byte {error.start:,} is {start[error.start]:#04x}"
            return what, "convert it to UTF-8, for example with iconv"
    return None


def prefix_problems(
    cfg: PrepareDataConfig, vocabulary: Mapping[str, int], eos_token: str | None
) -> Iterator[tuple[str, str]]:
    """Yields what is wrong with ``data.prefix``, each with a fix.

    Checks the sizes of the files. Compares their first tokens and documents with ``vocabulary``,
    the ids of the tokenizer's tokens, unless it is empty.
    """
    if not cfg.prefix:
        return
    fixes = ["data.sources=[]"] if cfg.sources else []
    fixes += ["data.format=text"] if cfg.chat_sources() else []
    if fixes:
        yield "data.prefix cannot be combined with sources or conversations", " ".join(fixes)
    source = parse_source(cfg.prefix)
    if source != Source(source.path, licence=source.licence):
        yield f"data.prefix={cfg.prefix} has an option other than licence", "remove it"
    try:
        if not vocabulary:
            require_token_files(cfg.prefix_path)
            return
        require_first_tokens(cfg.prefix_path, 1 + max(vocabulary.values()))
        end_token = cfg.document_end or default_document_end(vocabulary, eos_token)
        end = vocabulary.get(end_token or "")
        if end is not None:
            names = {token_id: token for token, token_id in vocabulary.items()}
            require_document_end(cfg.prefix_path, end, lambda token: names.get(token, "unknown"))
    except RecipeError as error:
        yield error.what, error.fix


def _weight_problems(cfg: PrepareDataConfig) -> Iterator[tuple[str, str]]:
    """Yields what is wrong with the sources' weights as a whole, each with a fix."""
    weighted = [source for source in cfg.sources if parse_source(source).weight]
    unweighted = [source for source in cfg.sources if source not in weighted]
    for source in cfg.heldout_sources:
        if parse_source(source).weight:
            yield f"held-out source '{source}' has a weight, but is not trained on", "remove it"
    if not weighted:
        return
    for source in unweighted:
        what = f"'{source}' has no weight, but {len(weighted)} of {len(cfg.sources)} sources do"
        yield what, "give every training source a weight, or give none a weight"
