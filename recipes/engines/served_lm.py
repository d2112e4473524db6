"""Adapts lm-eval's model classes to engines in this process and to servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import requests
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import GenerationConfig

from nemo_convert.generation_config import GENERATION_CONFIG
from recipes.core.errors import RecipeError
from recipes.core.metrics import ProgressCallback
from recipes.evaluation.packing import Request, truncated_context

if TYPE_CHECKING:  # TensorRT-LLM's image does not have Megatron
    from recipes.data.token_sequences import TextSequences

REQUEST_SECONDS = 24 * 3600
"""Time limit of one request. lm-eval's limit, 300 seconds, is too short for a large model on few
CPU cores. If the server dies, a request fails at once."""
FORCING_BIAS = 1000
"""Added to the logit of the token that a server must generate; exceeds all gaps between logits."""
ALL_TOKENS = 10**7
"""Number of log-probabilities to request for a whole vocabulary; larger than any vocabulary."""
SLICE = 32
"""Number of continuations that ``EngineLM`` scores between two reports of progress."""
AnswerT = TypeVar("AnswerT")


class ProgressLM(LM):
    """Reports progress after each generated text. lm-eval's classes generate all texts at once."""

    progress: ProgressCallback = staticmethod(lambda done, total: None)
    """Receives the numbers of finished and of all requests; in ``losses``, of sequences."""

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns generated text, one request at a time."""
        generate = partial(super().generate_until, disable_tqdm=True)
        return _answer_in_slices(generate, requests, 1, self.progress)


class ServedLM(ProgressLM, LocalCompletionsAPI):
    """Sends requests to a server. Tokenizes as ``HFLM`` does, which answers for the student."""

    def __init__(self, address: str, tokenizer: Path, max_length: int) -> None:
        super().__init__(
            model="student",
            base_url=f"{address}/v1/completions",
            tokenizer=str(tokenizer),
            tokenizer_backend="huggingface",
            max_length=max_length + 1,  # the base class subtracts 1
            max_retries=1,
            timeout=REQUEST_SECONDS,
        )
        self.add_bos_token = None  # use the tokenizer's default
        penalty = generation_settings(tokenizer).get("repetition_penalty")
        # Fields that are added to each request for generated text.
        self.penalty = self.penalty_request(penalty) if penalty else {}

    def penalty_request(self, penalty: float) -> dict[str, Any]:
        """Returns the fields of a request that set the student's repetition penalty."""
        return {"repetition_penalty": penalty}

    def _create_payload(
        self, messages: Any, generate: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Returns the body of a request that generates text, or else only scores a prompt.

        The base class ignores ``do_sample=False`` and some names of the maximum number of new
        tokens. ``HFLM`` accepts these settings, so this method translates them for the base class.
        """
        if generate:
            settings = kwargs["gen_kwargs"] or {}
            kwargs["gen_kwargs"] = normalize_gen_kwargs(settings, self._max_gen_toks)
        payload: dict[str, Any] = super()._create_payload(messages, generate=generate, **kwargs)
        return payload | self.penalty if generate else payload

    def tok_encode(self, string: Any, **kwargs: Any) -> Any:
        """Encodes text as ``HFLM`` does for the student. The base class has other rules for BOS."""
        if isinstance(string, str):
            return HFLM.tok_encode(self, string, kwargs.get("add_special_tokens"))
        return [self.tok_encode(text) for text in string]


class EngineLM(ProgressLM, HFLM):
    """Evaluates an engine in this process, and reports progress."""

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], **_: Any
    ) -> list[tuple[float, bool]]:
        """Returns each continuation's log-likelihood, and whether greedy decoding generates it."""
        score = partial(super()._loglikelihood_tokens, disable_tqdm=True)
        return _answer_in_slices(score, requests, SLICE, self.progress)


def _answer_in_slices(
    answer: Callable[[Any], list[AnswerT]],
    requests: Sequence[object],
    size: int,
    progress: ProgressCallback,
) -> list[AnswerT]:
    """Answers ``size`` requests at a time, and reports progress after each slice."""
    answers: list[AnswerT] = []
    for start in range(0, len(requests), size):
        answers += answer(requests[start : start + size])
        progress(len(answers), len(requests))
    return answers


class LlamaCppLM(ServedLM):
    """Evaluates with llama.cpp's server, which returns log-probabilities of generated tokens only.

    So each token of a continuation takes one request. The request adds ``FORCING_BIAS`` to the
    token's logit, so that the server generates the token. Log-probabilities in the answer exclude
    the bias. The server caches the context's keys and values, so a request costs one decoding step.
    """

    def penalty_request(self, penalty: float) -> dict[str, Any]:
        """Returns the request's fields, which penalize all earlier tokens, as in transformers."""
        return {"repeat_penalty": penalty, "repeat_last_n": self.max_length + 1}

    def token_score(self, context: Sequence[int], token: int) -> tuple[float, bool]:
        """Returns a token's log-probability after a context, and whether it is the likeliest token.

        The server withholds a generated token that ends inside a UTF-8 character. A second request
        then generates ``eos_token`` instead, and lists the log-probabilities of all tokens. Raises
        ``RecipeError`` if the answer does not have the token.
        """
        generated = self._generate(context, token, 1) or self._generate(
            context, self.tokenizer.eos_token_id, ALL_TOKENS
        )
        if generated:
            likeliest = generated["top_logprobs"]  # in descending order of probability
            for entry in (generated, *likeliest):
                if entry["id"] == token:
                    return entry["logprob"], likeliest[0]["id"] == token
        raise RecipeError(
            f"llama.cpp's server returned no log-probability of token {token}",
            "use a release whose server supports logit_bias and logprobs",
        )

    def _generate(self, context: Sequence[int], token: int, top: int) -> dict[str, Any] | None:
        """Makes the server generate ``token`` after a context.

        Returns the token's ``id`` and ``logprob``, and in ``top_logprobs`` the ``id`` and
        ``logprob`` of the ``top`` likeliest tokens; ``None`` if the server withholds the token.
        """
        request: dict[str, Any] = {"prompt": list(context), "max_tokens": 1, "temperature": 0}
        request |= {"logprobs": top, "logit_bias": {str(token): FORCING_BIAS}}
        response = requests.post(self.base_url, json=request, timeout=self.timeout)
        response.raise_for_status()
        logprobs = response.json()["choices"][0]["logprobs"]
        return logprobs["content"][0] if logprobs and logprobs["content"] else None

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], **_: Any
    ) -> list[tuple[float, bool]]:
        """Returns each continuation's log-likelihood, and whether greedy decoding generates it."""
        results = []
        for _id, context, continuation in requests:
            prompt = truncated_context(context, continuation, self.max_length)
            ids = [*prompt, *continuation]
            # Each token of the continuation is scored after all tokens before it.
            scores = [self.token_score(ids[:n], ids[n]) for n in range(len(prompt), len(ids))]
            log_likelihood = sum(log_probability for log_probability, _ in scores)
            results.append((log_likelihood, all(is_likeliest for _, is_likeliest in scores)))
            self.progress(len(results), len(requests))
        return results

    def losses(self, text: TextSequences) -> list[float]:
        """Returns each sequence's mean loss, in nats, over the predictions in its mask."""
        losses = []
        for ids, mask in zip(text.tokens.tolist(), text.prediction_mask.tolist(), strict=True):
            # The first token, 0, is not predicted, so the mask's first value is for token 1.
            targets = [n for n, in_loss in enumerate(mask, 1) if in_loss]
            log_probabilities = [self.token_score(ids[:n], ids[n])[0] for n in targets]
            losses.append(-sum(log_probabilities) / len(log_probabilities))
            self.progress(len(losses), len(text))
        return losses


def generation_settings(folder: Path) -> dict[str, Any]:
    """Returns a folder's generation settings that differ from transformers' defaults.

    Without a file ``generation_config.json``, the dict is empty.
    """
    if not (folder / GENERATION_CONFIG).exists():
        return {}
    settings: dict[str, Any] = GenerationConfig.from_pretrained(folder).to_diff_dict()
    return settings
