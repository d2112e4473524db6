"""Reads the vocabulary of a tokenizer file, and refuses a tokenizer that cannot encode text."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipes.core.errors import RecipeError

DOWNLOAD_FIX = "download it again; if it is a Git LFS pointer, with git lfs pull"
SAMPLE = "A quick  fox, 3.14!\n\té ß 東京 Привет مرحبا 😀 \0"
"""Text with many types of characters, which a valid tokenizer can encode."""
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
"""Matches the tokens that represent single bytes in tokenizers like Llama 2's."""


@contextmanager
def without_panics() -> Iterator[None]:
    """Raises a ``RuntimeError`` if the library tokenizers panics, and hides the panic's stack.

    A panic is an error of Rust. It is a ``BaseException`` of Python, and Rust writes its stack to
    file descriptor 2. Other output to this descriptor is kept until the end, then written.
    """
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as output:
        os.dup2(output.fileno(), 2)
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # its module cannot be imported
                raise
            output.truncate(0)  # drops the panic's stack
            raise RuntimeError(str(error)) from error
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            output.seek(0)
            os.write(2, output.read())


def vocabulary_of_json(file: Path) -> dict[str, int]:
    """Maps the tokens of a ``tokenizer.json`` to their ids.

    Raises:
        RecipeError: The file is not a tokenizer, or the tokenizer cannot encode ``SAMPLE``.
    """
    from tokenizers import Tokenizer

    problem = "is not a tokenizer"
    try:
        with without_panics():
            tokenizer = Tokenizer.from_file(str(file))
            problem = "cannot encode text"
            vocabulary = dict(tokenizer.get_vocab(with_added_tokens=True))
            if tokenizer.truncation:
                tokenizer.enable_truncation(**tokenizer.truncation)  # raises an error if invalid
            tokenizer.no_truncation()
            tokenizer.no_padding()
            ids = tokenizer.encode(SAMPLE).ids
            if not ids:
                raise ValueError("it has no token for any character")
            if unknown := set(ids) - set(vocabulary.values()):
                raise ValueError(f"it adds the id {min(unknown)} to a text, which no token has")
            _require_fixed_merges(tokenizer, vocabulary, file)
    except RecipeError:
        raise
    except Exception as error:  # the library raises Exception itself
        raise RecipeError(f"{file} {problem}: {first_line(error)}.", DOWNLOAD_FIX) from error
    return vocabulary


def _require_fixed_merges(tokenizer: Any, vocabulary: dict[str, int], file: Path) -> None:
    """Raises an error for a BPE tokenizer without merges, or with random ones (dropout)."""
    from tokenizers.models import BPE

    model = tokenizer.model
    if not isinstance(model, BPE):
        return
    if model.dropout:
        what = f"{file} has dropout={model.dropout:.3g}, so it splits a text randomly."
        raise RecipeError(what, "set dropout to null in it")
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}

    def needs_merges(token: str) -> bool:
        return len(token) > 1 and token not in added and not BYTE_TOKEN.fullmatch(token)

    def is_merged(token: str) -> bool:
        return [piece.value for piece in model.tokenize(token)] == [token]

    # ``any`` stops at the first token that merges make. Reading all merges would take longer.
    has_merges = model.ignore_merges or any(map(is_merged, filter(needs_merges, vocabulary)))
    if not has_merges and (unused := sum(map(needs_merges, vocabulary))):
        raise ValueError(f"it has no merges, so no text has {unused} of its tokens")


def vocabulary_of_vocab_json(folder: Path) -> dict[str, int]:
    """Maps the tokens of ``vocab.json`` to their ids; checks ``merges.txt``, too.

    Raises:
        RecipeError: The files are not a tokenizer.
    """
    from tokenizers.models import BPE

    try:
        with without_panics():
            files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
            vocabulary, merges = BPE.read_file(*files)
            BPE(vocabulary, merges)  # raises an error for a merge of unknown tokens
    except Exception as error:  # the library raises Exception itself
        what = f"{folder}: vocab.json and merges.txt are not a tokenizer: {first_line(error)}."
        raise RecipeError(what, DOWNLOAD_FIX) from error
    return dict(vocabulary)


def vocabulary_of_sentencepiece(file: Path) -> dict[str, int]:
    """Maps the tokens of a sentencepiece model to their ids.

    Raises:
        RecipeError: The file is not a sentencepiece model.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise RecipeError(f"{file} is not a sentencepiece model.", DOWNLOAD_FIX) from error
    return {model.id_to_piece(i): i for i in range(model.get_piece_size())}


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, without a full stop."""
    return str(error).partition("\n")[0].rstrip(".")
