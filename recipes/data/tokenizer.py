"""Tokenizes documents in worker processes on all ranks, and adds tokens around each document."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from recipes.core.errors import RecipeError
from recipes.core.processes import death_message, die_with_parent
from recipes.core.stage import rank, world_size
from recipes.core.watchdog import report_progress
from recipes.data.settings import default_document_end

AHEAD = 4
"""Batches queued per worker process, so that no worker waits for text."""
LONGEST_WAIT = timedelta(days=1)
"""Timeout of collectives. It is long, because the watchdog (``resources.hang_timeout``) detects
hangs earlier."""
ItemT = TypeVar("ItemT")


@dataclass(frozen=True, eq=False)
class Encoded:
    """A tokenized document, special tokens included."""

    ids: np.ndarray
    """Token ids, int32 [n]."""
    loss_mask: np.ndarray | None = None
    """Which tokens are targets of the loss, bool [n]. ``None``: all but the first."""
    shortened: bool = False
    """Whether a conversation was truncated to fit a sequence."""
    left_out_reason: str = ""
    """Why the document is left out and has no tokens; empty if it is used."""

    @classmethod
    def left_out_because(cls, reason: str) -> Encoded:
        """Returns an ``Encoded`` without tokens for a document that is not used."""
        return cls(np.empty(0, np.int32), left_out_reason=reason)


class Encoder(Protocol):
    """Interface of ``DocumentTokenizer`` and ``ChatTokenizer``.

    An encoder must support pickling, because worker processes receive a copy.
    """

    def encode(self, texts: list[str]) -> list[Encoded]:
        """Returns one tokenized document per text."""


@dataclass(frozen=True)
class DocumentTokenizer:
    """Tokenizes plain text, and adds one token before and one after each document."""

    definition: str
    """Content of ``tokenizer.json``."""
    begin: int | None
    """Token before every document; ``None`` if the tokenizer does not add one."""
    end: int
    """Token after every document. The prediction of the token that follows it is not in the loss,
    because that token starts another document."""

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.definition)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Makes "<|endoftext|>" in a document ordinary text, except in a Unigram model, where the
        # special token is also a piece of the vocabulary.
        tokenizer.encode_special_tokens = True
        return tokenizer

    @property
    def size(self) -> int:
        """The largest token id plus 1."""
        ids: list[int] = self._tokenizer.get_vocab(with_added_tokens=True).values()
        return 1 + max(ids)

    def decode(self, ids: list[int]) -> str:
        """Returns the text of tokens, special tokens included."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def encode(self, texts: list[str]) -> list[Encoded]:
        """Returns the documents' tokens between ``begin`` and ``end``."""
        begin = [] if self.begin is None else [self.begin]
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [Encoded(np.array([*begin, *t.ids, self.end], dtype=np.int32)) for t in encoded]


def encode_all(
    encoder: Encoder, batches: Iterable[tuple[list[str], ItemT]], processes: int
) -> Iterator[tuple[list[Encoded], ItemT]]:
    """Yields encoded batches in order. Encodes in worker processes if ``processes`` is above 1.

    A batch is a list of texts and any item, which is yielded unchanged with the encoded texts.

    Raises:
        RecipeError: A worker process was killed.
    """
    # The library ``tokenizers`` would start threads, which would compete for the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if processes == 1:
        yield from ((encoder.encode(texts), item) for texts, item in batches)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        processes, context, initializer=_initialize_worker, initargs=(encoder, os.getpid())
    ) as pool:
        queue: deque[tuple[Future[list[Encoded]], ItemT]] = deque()
        remaining_batches = iter(batches)
        try:
            while True:
                # Fill the queue, then wait for its oldest batch.
                for texts, item in islice(remaining_batches, AHEAD * processes - len(queue)):
                    queue.append((pool.submit(_encode_in_worker, texts), item))
                if not queue:
                    return
                encoded, item = queue.popleft()
                yield encoded.result(), item
        except BrokenProcessPool as error:
            # The pool does not tell the signal. It is usually SIGKILL, because memory ran out.
            raise RecipeError(
                f"a tokenizer process was {death_message(-signal.SIGKILL)}.",
                "run the same command to resume; fewer processes take less memory",
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def encode_on_ranks(
    encoder: Encoder, batches: Iterator[tuple[list[str], ItemT]], processes: int
) -> Generator[tuple[list[Encoded], ItemT], None, None]:
    """Encodes batches in order on all ranks; only rank 0 yields them.

    Every rank reads all batches. A group is as many consecutive batches as there are ranks, and
    rank r encodes batch r of each group. All ranks stop when the caller on rank 0 closes the
    generator.
    """
    if world_size() == 1:
        yield from encode_all(encoder, batches, processes)
        return
    for encoded, items in encode_all(encoder, _groups(batches), processes):
        encoded_by_rank: list[Any] | None = [None] * world_size() if rank() == 0 else None
        torch_distributed().gather_object(encoded, encoded_by_rank)
        try:
            # Ranks above 0 yield nothing. The last group may have fewer batches than ranks.
            yield from zip(encoded_by_rank or [], items, strict=False)
        except GeneratorExit:  # the caller on rank 0 stops early
            broadcast(False)  # tells the other ranks to stop
            raise
        report_progress()
        if not broadcast(True):  # rank 0's value: whether to continue
            return


def _groups(
    batches: Iterator[tuple[list[str], ItemT]],
) -> Iterator[tuple[list[str], list[ItemT]]]:
    """Yields for each group the texts of this rank's batch, and the items of all its batches.

    If the last group has fewer batches than there are ranks, the last ranks have no texts.
    """
    while group := list(islice(batches, world_size())):
        texts = group[rank()][0] if rank() < len(group) else []
        yield texts, [item for _, item in group]


def broadcast(value: Any) -> Any:
    """Returns rank 0's value on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    torch_distributed().broadcast_object_list(values)
    return values[0]


def torch_distributed() -> Any:
    """Returns ``torch.distributed``. Creates the process group of all ranks if there is none."""
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
    return distributed


_worker_encoder: list[Encoder] = []
"""The encoder of this worker process; empty in other processes."""


def _initialize_worker(encoder: Encoder, parent: int) -> None:
    """Prepares a worker process whose parent has the process id ``parent``."""
    die_with_parent()
    if os.getppid() != parent:  # the parent died before the call above took effect
        os._exit(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_encoder.append(encoder)


def _encode_in_worker(texts: list[str]) -> list[Encoded]:
    return _worker_encoder[0].encode(texts)


def load_tokenizer(folder: Path, document_end: str | None = None) -> DocumentTokenizer:
    """Reads the tokenizer in the folder of a Hugging Face model or a NeMo checkpoint.

    ``default_document_end`` chooses the token after each document if ``document_end`` is not set.

    Raises:
        RecipeError: The vocabulary does not have the token, or there is no ``tokenizer.json``.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise RecipeError(
            f"the tokenizer in {folder} has no tokenizer.json.",
            "save it with transformers' fast tokenizer first",
        )
    vocabulary = tokenizer.get_vocab()
    end = document_end or default_document_end(vocabulary, tokenizer.eos_token)
    if end not in vocabulary:
        raise RecipeError(
            f"the tokenizer in {folder} has no token {end or tokenizer.eos_token or 'eos_token'}.",
            "set data.document_end to a token of its vocabulary",
        )
    # A tokenizer that defines ``bos_token`` may not add it to text. A short text shows this.
    first = tokenizer("a")["input_ids"][0]
    begin = first if first == tokenizer.bos_token_id else None
    return DocumentTokenizer(tokenizer.backend_tokenizer.to_str(), begin, vocabulary[end])
