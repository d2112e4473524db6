"""Documents as tokens, each with the marks that tell where it begins and ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from recipes.core.errors import RecipeError
from recipes.core.processes import die_with_parent, ended_by

ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")
"""What models were trained to see between documents, where ``eos_token`` ends a turn of a chat."""
AHEAD = 4
"""Batches that wait for each process, so that none waits for text."""
ItemT = TypeVar("ItemT")


@dataclass(frozen=True, eq=False)
class Encoded:
    """A document as tokens, marks included."""

    ids: np.ndarray
    """int32 [n]."""
    learnt: np.ndarray | None = None
    """bool [n]: which of them are to be predicted; all but the first where there is none."""
    cut: bool = False
    """Something is missing at its end."""
    left_out: str = ""
    """Why it is not taken; it has no tokens then."""

    @classmethod
    def without(cls, reason: str) -> Encoded:
        """A document that is left out."""
        return cls(np.empty(0, np.int32), left_out=reason)


class Encoder(Protocol):
    """What makes tokens of documents; it is sent to other processes."""

    def encode(self, texts: list[str]) -> list[Encoded]:
        """Tokens of each document."""


@dataclass(frozen=True)
class DocumentTokenizer:
    """A tokenizer, and the tokens around a document."""

    definition: str
    """What ``tokenizer.json`` holds."""
    begin: int | None
    """Stands before every document where the tokenizer puts it before a text by itself."""
    end: int
    """Stands after every document; what is predicted from it is another document's beginning."""

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.definition)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # a mark's name in a text is only text
        return tokenizer

    def encode(self, texts: list[str]) -> list[Encoded]:
        """Tokens of each document, marks included."""
        begin = [] if self.begin is None else [self.begin]
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [Encoded(np.array([*begin, *t.ids, self.end], dtype=np.int32)) for t in encoded]


def encode_all(
    encoder: Encoder, batches: Iterable[tuple[list[str], ItemT]], processes: int
) -> Iterator[tuple[list[Encoded], ItemT]]:
    """Encodes batches in their order, a few ahead of the one that is returned.

    With one process it is this one.

    Raises:
        RecipeError: A process was killed.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would want the same cores
    if processes == 1:
        yield from ((encoder.encode(texts), item) for texts, item in batches)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start, (encoder, os.getpid())) as pool:
        waiting: deque[tuple[Future[list[Encoded]], ItemT]] = deque()
        source = iter(batches)
        try:
            while True:
                for texts, item in islice(source, AHEAD * processes - len(waiting)):
                    waiting.append((pool.submit(_encode, texts), item))
                if not waiting:
                    return
                encoded, item = waiting.popleft()
                yield encoded.result(), item
        except BrokenProcessPool as error:
            raise RecipeError(
                f"a process that tokenizes was {ended_by(-signal.SIGKILL)}.",
                "the same command resumes; fewer processes take less memory",
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_here: list[Encoder] = []
"""What a process encodes with for another."""


def _start(encoder: Encoder, parent: int) -> None:
    die_with_parent()
    if os.getppid() != parent:  # it died before it could take this process with it
        os._exit(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _here.append(encoder)


def _encode(texts: list[str]) -> list[Encoded]:
    return _here[0].encode(texts)


def load_tokenizer(folder: Path, document_end: str | None = None) -> DocumentTokenizer:
    """Reads the tokenizer in a folder of a Hugging Face model or a NeMo checkpoint.

    After a document stands ``document_end``; by default the end of text that base and instruct
    models share (``ENDS_OF_TEXT``), and ``eos_token`` where there is none. An instruct model's
    ``eos_token`` is often the end of a turn, after which it expects a chat's role. Refuses a
    tokenizer without such a token, and one that is not of ``tokenizers``.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise RecipeError(
            f"the tokenizer in {folder} has no tokenizer.json.",
            "save it with transformers' fast tokenizer first",
        )
    vocabulary = tokenizer.get_vocab()
    wanted = [document_end] if document_end else [*ENDS_OF_TEXT, tokenizer.eos_token]
    ends = [vocabulary[token] for token in wanted if token in vocabulary]
    if not ends:
        raise RecipeError(
            f"the tokenizer in {folder} has no token {wanted[-1] or 'eos_token'}.",
            "set data.document_end to a token of its vocabulary",
        )
    first = tokenizer("a")["input_ids"][0]
    begin = first if first == tokenizer.bos_token_id else None
    return DocumentTokenizer(tokenizer.backend_tokenizer.to_str(), begin, ends[0])
