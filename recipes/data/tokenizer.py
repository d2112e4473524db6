"""Documents as tokens, each with the marks that tell where it begins and ends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.core.errors import RecipeError

ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")
"""What models were trained to see between documents, where ``eos_token`` ends a turn of a chat."""


@dataclass(frozen=True)
class DocumentTokenizer:
    """A tokenizer, and the tokens around a document."""

    tokenizer: Any
    """Of ``transformers``."""
    begin: int | None
    """Stands before every document where the tokenizer puts it before a text by itself."""
    end: int
    """Stands after every document; what is predicted from it is another document's beginning."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokens of each document, marks included; a mark's name in a text is only text."""
        begin = [] if self.begin is None else [self.begin]
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,  # of documents longer than the model's positions, which windows cut
        )
        return [[*begin, *ids, self.end] for ids in encoded["input_ids"]]


def load_tokenizer(folder: Path, document_end: str | None = None) -> DocumentTokenizer:
    """Reads the tokenizer in a folder.

    Args:
        folder: A Hugging Face model's, or a NeMo checkpoint's.
        document_end: Token after a document; by default the end of text that base and instruct
            models share (``ENDS_OF_TEXT``), and ``eos_token`` where there is none. An instruct
            model's ``eos_token`` is often the end of a turn, after which it expects a chat's role.

    Raises:
        RecipeError: There is no such token.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
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
    return DocumentTokenizer(tokenizer, begin, ends[0])
