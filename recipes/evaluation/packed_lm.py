"""Runs lm-eval's tasks on a model in memory, with questions packed into shared sequences.

lm-eval scores each choice of a question in a separate sequence, with logits at every position. So
it processes a question with four choices four times. ``PackedLM`` processes the question once,
followed by all its choices. It packs several questions into one sequence, where an attention mask
separates them. Few-shot examples that consecutive questions share are processed only once. The
log-likelihoods are those of lm-eval.

The packs are distributed over the ranks, but lm-eval runs on every rank as if it were the only one.
Otherwise lm-eval would draw few-shot examples that depend on the number of ranks, and would fail on
a rank without items of a subject.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Sequence

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from recipes.core.metrics import ProgressCallback
from recipes.core.stage import rank, world_size
from recipes.evaluation.packing import (
    Question,
    Request,
    attention_bias,
    pack_layout,
    packs_of_rank,
    scored_positions,
)
from recipes.evaluation.predictions import float32_head
from recipes.evaluation.ranks import gather
from recipes.evaluation.settings import GENERATION_BATCH


def leave_length_to_tasks(settings: GenerationConfig) -> None:
    """Resets, in place, a model's generation settings that conflict with tasks or ``HFLM``."""
    # Each task sets the length and the texts at which generation stops.
    settings.update(max_new_tokens=None, stop_strings=None)
    # HFLM expects one sequence per prompt, as a tensor.
    settings.update(num_return_sequences=1, return_dict_in_generate=False)


class PackedLM(HFLM):
    """Scores a question and all its choices in one forward pass.

    A prefix that several questions share is processed first, in a separate pass. lm-eval must call
    the methods on every rank with all requests. Each rank returns all answers.

    Args:
        model: The model to evaluate. Its generation config is changed.
        tokenizer: The model's tokenizer.
        pack_tokens: Maximum tokens of a forward pass, except for a single longer question.
        progress: Receives the number of requests that this rank has answered, and the number that
            this rank has to answer.
        max_length: Maximum tokens of a prompt and its answer; by default what the model accepts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pack_tokens: int,
        progress: ProgressCallback,
        max_length: int | None = None,
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=GENERATION_BATCH,
            max_length=max_length,
            trust_remote_code=False,
        )
        leave_length_to_tasks(model.generation_config)
        self._pack_tokens, self._progress = pack_tokens, progress
        self._head = float32_head(model.lm_head.weight.detach())

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], **_: object
    ) -> list[tuple[float, bool]]:
        """Returns each continuation's log-likelihood, and whether greedy decoding generates it."""
        # Pairs of a prefix and the packs of questions that follow it.
        groups = list(
            packs_of_rank(requests, self.max_length, self._pack_tokens, rank(), world_size())
        )
        rank_questions = [question for _, packs in groups for pack in packs for question in pack]
        total = sum(len(question.requests) for question in rank_questions)
        rank_scores: dict[int, tuple[float, bool]] = {}  # by index of the request
        for prefix, packs in groups:
            cache = self._prefix_cache(prefix)
            for pack in packs:
                rank_scores.update(self._score(pack, cache))
                cache.crop(len(prefix))  # removes the questions, which _score appended
                self._progress(len(rank_scores), total)
        scores = ChainMap(*gather(rank_scores))
        return [scores[index] for index in range(len(requests))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns generated text. Batches are the same on any number of ranks."""

        def sort_key(index: int) -> tuple[int, str]:
            """Sorts requests from the longest to the shortest, and equal lengths by text."""
            context = requests[index].args[0]
            return -len(self.tok_encode(context)), context

        order = sorted(range(len(requests)), key=sort_key)  # indices of requests
        batches = [order[n : n + GENERATION_BATCH] for n in range(0, len(order), GENERATION_BATCH)]
        rank_batches = batches[rank() :: world_size()]
        rank_texts: dict[int, str] = {}  # by index of the request
        for batch in rank_batches:
            answers = super().generate_until([requests[n] for n in batch], disable_tqdm=True)
            rank_texts.update(zip(batch, answers, strict=True))
            self._progress(len(rank_texts), sum(map(len, rank_batches)))
        texts = ChainMap(*gather(rank_texts))
        return [texts[index] for index in range(len(requests))]

    @torch.no_grad()
    def _prefix_cache(self, prefix: Sequence[int]) -> DynamicCache:
        """Returns a cache with the keys and values of a prefix; empty if the prefix is empty."""
        cache = DynamicCache()
        if prefix:
            self.model.model(
                torch.tensor([prefix], device=self.device), past_key_values=cache, use_cache=True
            )
        return cache

    @torch.no_grad()
    def _score(
        self, pack: list[Question], cache: DynamicCache
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Scores questions that follow the cached prefix, and appends them to the cache.

        Yields each request's index with its score, as in ``_loglikelihood_tokens``.
        """
        tokens, positions, segments = pack_layout(pack)
        rows, targets = scored_positions(pack)
        prefix_tokens = cache.get_seq_length()
        bias = attention_bias(segments, self.model.dtype, prefix_tokens)
        states = self.model.model(
            torch.tensor([tokens], device=self.device),
            position_ids=prefix_tokens + torch.tensor([positions], device=self.device),
            attention_mask=bias.to(self.device),
            past_key_values=cache,
        ).last_hidden_state[0]
        log_probabilities = torch.log_softmax(self._head(states[rows]), dim=-1)
        target_ids = torch.tensor(targets, device=self.device)
        scores = log_probabilities.gather(-1, target_ids[:, None])[:, 0]
        is_greedy = log_probabilities.argmax(-1) == target_ids
        start = 0  # ``scores`` has the continuations of all questions, one after the other
        for question in pack:
            for index, continuation in zip(question.requests, question.continuations, strict=True):
                end = start + len(continuation)
                yield index, (float(scores[start:end].sum()), bool(is_greedy[start:end].all()))
                start = end
