"""Marks around documents, for tokenizers as base and instruct models have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from recipes.core.errors import RecipeError
from recipes.data.tokenizer import DocumentTokenizer, load_tokenizer


def saved(folder: Path, *marks: str, begins: bool = False, **names: str) -> Path:
    """A tokenizer of letters and these marks, which may put ``<s>`` before every text."""
    vocabulary = {token: i for i, token in enumerate([*"abc", *marks])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(marks))
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def encoded(tokenizer: DocumentTokenizer, texts: list[str]) -> list[list[int]]:
    return [one.ids.tolist() for one in tokenizer.encode(texts)]


@pytest.mark.parametrize(
    ("marks", "eos", "end"),
    [
        (["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>"),  # SmolLM2, Qwen: base
        (["<|im_end|>", "<|endoftext|>"], "<|im_end|>", "<|endoftext|>"),  # instruct
        (["<|im_end|>", "<|end_of_text|>"], "<|im_end|>", "<|end_of_text|>"),  # Llama 3 instruct
        (["<s>", "</s>"], "</s>", "</s>"),  # Mistral: one end for all
    ],
)
def test_a_document_ends_with_the_end_of_text(
    tmp_path: Path, marks: list[str], eos: str, end: str
) -> None:
    documents = load_tokenizer(saved(tmp_path, *marks, eos_token=eos))
    assert documents.begin is None
    assert documents.end == 3 + marks.index(end)
    assert encoded(documents, ["ab", "c"]) == [[0, 1, documents.end], [2, documents.end]]


def test_a_document_begins_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    names: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    documents = load_tokenizer(saved(tmp_path / "with", "<s>", "</s>", begins=True, **names))
    assert encoded(documents, ["ab", "c"]) == [[3, 0, 1, 4], [3, 2, 4]]
    documents = load_tokenizer(saved(tmp_path / "without", "<s>", "</s>", **names))
    assert encoded(documents, ["ab"]) == [[0, 1, 4]]


def test_the_token_between_documents_can_be_chosen(tmp_path: Path) -> None:
    folder = saved(tmp_path, "<|im_end|>", "<|endoftext|>", eos_token="<|im_end|>")
    assert encoded(load_tokenizer(folder, "<|im_end|>"), ["a"]) == [[0, 3]]
    with pytest.raises(RecipeError, match="has no token </s>") as caught:
        load_tokenizer(folder, "</s>")
    assert "data.document_end" in str(caught.value)


def test_a_mark_that_a_text_names_ends_nothing(tmp_path: Path) -> None:
    folder = saved(tmp_path, "<|endoftext|>", eos_token="<|endoftext|>")
    [ids] = encoded(load_tokenizer(folder), ["a<|endoftext|>b"])
    assert ids.index(3) == len(ids) - 1


def test_a_tokenizer_without_any_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no token eos_token"):
        load_tokenizer(saved(tmp_path, "<s>"))
