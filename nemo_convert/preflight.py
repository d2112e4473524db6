"""Checks a Hugging Face model before anything runs, from headers and small files. Torch-free.

``python -m nemo_convert check MODEL`` prints the findings; a dry run includes them in its plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_convert.architecture import Architecture
from nemo_convert.families import FAMILIES
from nemo_convert.generation_config import generation_problems
from nemo_convert.headers import Headers, have_same_bytes, read_headers, weight_files
from nemo_convert.hf_config import DTYPES, read_architecture
from nemo_convert.hub import (
    ADAPTER,
    INDEX_FILE,
    ROTARY_BUFFER,
    WEIGHTS_FILE,
    cached_model,
    hub_arguments,
    is_config_available,
    is_hub_id,
    is_offline,
    read_hf_config,
    read_index,
    side_folder,
)
from nemo_convert.tokenizer_files import is_replaced_by_transformers_5, read_vocabulary
from recipes.core.errors import RecipeError
from recipes.core.wheels import parse_wheel_file

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
"""Hugging Face names of the output layer (here: the head) and of the input embedding."""
QUANTIZED = (
    *(".qweight", ".qzeros", ".g_idx", ".weight_packed", ".weight_scale", ".weight_scale_inv"),
    *(".absmax", ".quant_map", ".SCB"),
)
"""Ends of names that only weights of quantized models have: GPTQ, AWQ, FP8, bitsandbytes."""
UNQUANTIZED_FIX = "use the unquantized model"
MERGE_FIX = "merge the adapter (peft's merge_and_unload), and save the model"


@dataclass(frozen=True)
class Finding:
    """A fault of a model, or with ``is_error=False`` a note for the user."""

    what: str
    fix: str
    is_error: bool = True

    def __str__(self) -> str:
        return f"{'error' if self.is_error else 'note'}: {self.what}\n  fix: {self.fix}"


def check_model(hf_path: str) -> Iterator[Finding]:
    """Yields the faults of a model folder or hub model, and notes about it.

    Reads only headers and small files. But if a model has tied embeddings and also stores a head,
    compares the values of head and embedding; for a hub model, only samples of the values.

    Raises:
        RecipeError: The config cannot be read or is not supported, or the hub cannot be reached.
    """
    if parse_wheel_file(hf_path):  # a wheel has no safetensors, so only the config is checked
        read_architecture(read_hf_config(hf_path), hf_path)
        return
    if is_hub_id(hf_path) and is_offline():
        folder = complete_cached_model(hf_path)
        if folder is None:
            name, revision = hub_arguments(hf_path).values()
            command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
            yield Finding(
                f"the weights of {hf_path} are not checked: HF_HUB_OFFLINE is set, and they are "
                "not in the cache.",
                f"download the model first ({command}), or allow requests to the hub; or, if it is "
                "a folder, correct its path",
                is_error=False,
            )
            return
        hf_path = str(folder)
    config = read_hf_config(hf_path)
    folder = side_folder(hf_path)  # has the small files, such as those of the tokenizer
    arch = read_architecture(config, hf_path)
    if (folder / ADAPTER).exists():
        yield Finding(
            f"{hf_path} has {ADAPTER}, so transformers would load an adapter on another model.",
            f"{MERGE_FIX}; or remove the file, if it does not belong to the model",
        )
    try:
        headers = read_headers(hf_path)
    except RecipeError as error:
        # If the hub cannot be read, the model's copy in the local cache is checked instead.
        if is_hub_id(hf_path) and (cached := complete_cached_model(hf_path)):
            yield from check_model(str(cached))
        else:
            yield Finding(error.what, error.fix)
        return
    yield from _index_findings(folder, headers)
    yield from _tensor_findings(hf_path, headers, arch)
    yield from _tied_head_findings(hf_path, headers, arch)
    yield from _dtype_findings(hf_path, headers, config)
    yield from _side_file_findings(folder, hf_path, arch)


def require_sound_side_files(folder: Path, arch: Architecture) -> None:
    """Raises ``RecipeError`` for a fault of the tokenizer or the generation config in a folder."""
    _raise_errors(_side_file_findings(folder, str(folder), arch))


def complete_cached_model(hf_path: str) -> Path | None:
    """Returns the snapshot of a hub model in the local cache, if it has all weights."""
    folder = cached_model(hf_path)
    try:
        return folder if folder and weight_files(folder) else None
    except RecipeError:  # weights are missing
        return None


def tokenizer_folder(hf_path: str) -> Path | None:
    """Returns a folder with the files of a model's tokenizer; downloads those of a hub model.

    Does not check that a local folder exists. Returns ``None`` if the hub does not answer, or if
    requests are forbidden and the cache does not have the complete model.
    """
    if not is_hub_id(hf_path):
        return Path(hf_path)
    if is_offline():
        return complete_cached_model(hf_path)
    return side_folder(hf_path) if is_config_available(hf_path) else None


def require_convertible(hf_path: str) -> None:
    """Raises ``RecipeError`` if ``check_model`` finds an error in a model."""
    _raise_errors(check_model(hf_path))


def _raise_errors(findings: Iterable[Finding]) -> None:
    """Raises one ``RecipeError`` for all errors among the findings."""
    errors = [finding for finding in findings if finding.is_error]
    if errors:
        raise RecipeError("\n".join(error.what for error in errors), errors[0].fix)


def model_dtype(headers: Headers) -> str:
    """Returns the name of the dtype that holds all weights exactly: float32 if dtypes differ."""
    dtypes = {DTYPES[tensor.dtype] for tensor in headers.values()}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def _index_findings(folder: Path, headers: Headers) -> Iterator[Finding]:
    """Checks that the index, if there is one, names the right shard for each tensor."""
    files = {tensor.file for tensor in headers.values()}
    if not (folder / INDEX_FILE).is_file() or files == {WEIGHTS_FILE}:
        return  # transformers ignores the index if all weights are in one file
    index = read_index(folder).items()
    indexed = {(name, file) for name, file in index if not name.endswith(ROTARY_BUFFER)}
    stored = {(name, tensor.file) for name, tensor in headers.items()}
    # ^ selects the pairs that only the index or only the shards have.
    if different := {name for name, _ in indexed ^ stored}:
        yield Finding(
            f"{INDEX_FILE} and the shards disagree about {_list_names(different)}.",
            "download the model again, or correct the index",
        )


def _tensor_findings(hf_path: str, headers: Headers, arch: Architecture) -> Iterator[Finding]:
    """Reports that there are too few tensors, or quantized ones; or else wrong names and shapes."""
    # Each layer and each expert has weights. A huge wrong size stops here, because the list of all
    # names that it implies could fill the memory.
    if arch.num_layers * max(1, arch.num_moe_experts) > len(headers):
        sizes = {"num_hidden_layers": arch.num_layers}
        if arch.num_moe_experts:
            sizes["num_experts"] = arch.num_moe_experts
        settings = ", ".join(f"{name}={size}" for name, size in sizes.items())
        yield Finding(
            f"{hf_path} has only {len(headers)} weights, but {settings} in config.json.",
            f"correct {' or '.join(sizes)}, or download the model again",
        )
        return
    if quantized := [name for name in headers if name.endswith(QUANTIZED)]:
        yield Finding(f"{hf_path} is quantized: it has {_list_names(quantized)}.", UNQUANTIZED_FIX)
        return
    yield from _shape_findings(hf_path, headers, arch)


def _shape_findings(hf_path: str, headers: Headers, arch: Architecture) -> Iterator[Finding]:
    """Reports missing tensors, tensors of other shapes, and additional ones."""
    expected = FAMILIES[arch.hf_architecture].hf_shapes(arch)
    missing = expected.keys() - headers.keys()
    tied_head = {HEAD} if arch.tied_embeddings else set()
    extra = headers.keys() - expected.keys() - tied_head
    if missing == {HEAD} and not extra:
        yield Finding(
            f"{hf_path} has no {HEAD}, but tie_word_embeddings is false in config.json.",
            "set tie_word_embeddings to true, or save the model with its output layer",
        )
    elif missing:
        but_has_extra = f", but has {_list_names(extra)}" if extra else ""
        yield Finding(
            f"{hf_path} has no {_list_names(missing)}, which config.json implies{but_has_extra}.",
            _names_fix(missing, extra, arch.hf_architecture),
        )
        extra = set()  # named above
    for name in sorted(expected.keys() & headers.keys()):
        if headers[name].shape != expected[name]:
            yield Finding(
                f"{name} has shape {[*headers[name].shape]} in {headers[name].file}, but "
                f"{[*expected[name]]} according to config.json.",
                "use config.json and weights of one model, or correct the sizes in config.json",
            )
            return  # one wrong size usually makes many shapes differ
    if extra:
        yield Finding(
            f"{hf_path} has {_list_names(extra)}, which {arch.hf_architecture} does not have.",
            MERGE_FIX
            if any(".lora_" in name for name in extra)
            else "save the model without these weights: a conversion would drop them",
        )


def _names_fix(missing: Set[str], extra: Set[str], hf_architecture: str) -> str:
    """Returns the fix for a model without the ``missing`` weights and with ``extra`` ones.

    Loading and saving the model with transformers is no fix: transformers would load random values
    for the missing weights.
    """
    # All names may have one prefix, such as "language_model.". An extra name that ends with a
    # missing name gives a candidate for the prefix. One missing name suffices for this search.
    suffix = min(missing)
    for prefix in sorted(name.removesuffix(suffix) for name in extra if name.endswith(suffix)):
        if {prefix + name for name in missing} <= extra:
            return f"rename the weights: remove {prefix!r} from the start of their names"
    if any(".lora_" in name for name in extra):
        return MERGE_FIX
    if {name.removeprefix("model.") for name in missing - {HEAD}} <= extra:
        return f"rename the weights except {HEAD}: add 'model.' to the start of their names"
    if any(name.endswith("experts.gate_up_proj") for name in extra):
        return (
            "split the experts: N.gate_proj.weight and N.up_proj.weight are the first and the "
            "second half of gate_up_proj[N] in dimension 0, and N.down_proj.weight is down_proj[N]"
        )
    return (
        f"download the weights again, or use weights with the names of {hf_architecture}; do not "
        "save them with transformers, which loads random values for missing weights"
    )


def _tied_head_findings(hf_path: str, headers: Headers, arch: Architecture) -> Iterator[Finding]:
    """Compares a stored head with the embedding that the config ties to it.

    If the two differ, transformers 5 uses the stored head, but transformers 4 drops it.
    """
    if not arch.tied_embeddings or not {HEAD, EMBEDDING} <= headers.keys():
        return
    head, embedding = headers[HEAD], headers[EMBEDDING]
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        untie_fix = ", or set tie_word_embeddings to false if the two have different values"
        yield Finding(
            f"{HEAD} is {head.dtype} {[*head.shape]}, but {EMBEDDING}, which is tied to it in "
            f"config.json, is {embedding.dtype} {[*embedding.shape]}.",
            f"remove {HEAD}{untie_fix if head.shape == embedding.shape else ''}",
        )
        return
    try:
        is_tied = have_same_bytes(hf_path, head, embedding)
    except RecipeError as error:
        yield Finding(
            f"{HEAD} and the tied {EMBEDDING} are not compared before the download: {error.what}",
            f"none needed: they are compared after the download; or {error.fix}",
            is_error=False,
        )
        return
    if not is_tied:
        yield Finding(
            f"{HEAD} differs from {EMBEDDING}, but tie_word_embeddings is true in config.json.",
            "set tie_word_embeddings to false in config.json",
        )


def _dtype_findings(hf_path: str, headers: Headers, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Reports dtypes that are not supported, and dtypes other than that of the config."""
    if unsupported := {tensor.dtype for tensor in headers.values()} - DTYPES.keys():
        yield Finding(
            f"{hf_path} has weights of type {', '.join(sorted(unsupported))}.",
            "save the weights in float32 or bfloat16"
            if unsupported == {"F64"}
            else f"{UNQUANTIZED_FIX}, with weights in {', '.join(DTYPES)}",
        )
        return
    stored = sorted({DTYPES[tensor.dtype] for tensor in headers.values()})
    configured = config.get("torch_dtype")
    if stored != [configured]:
        setting = f"torch_dtype={configured}" if configured else "no torch_dtype"
        yield Finding(
            f"the weights of {hf_path} are {' and '.join(stored)}, but config.json has {setting}.",
            f"none needed: {model_dtype(headers)} is used, which holds every weight exactly",
            is_error=False,
        )


def _side_file_findings(folder: Path, hf_path: str, arch: Architecture) -> Iterator[Finding]:
    try:
        for what, fix in generation_problems(folder, arch.vocab_size):
            yield Finding(what, fix)
    except RecipeError as error:
        yield Finding(error.what, error.fix)
    yield from _tokenizer_findings(folder, hf_path, arch)


def _tokenizer_findings(folder: Path, hf_path: str, arch: Architecture) -> Iterator[Finding]:
    """Reports a tokenizer that cannot be read, that transformers 5 replaces, or that is too big."""
    try:
        vocabulary = read_vocabulary(folder)
    except RecipeError as error:
        yield Finding(error.what, error.fix)
        return
    if is_replaced_by_transformers_5(folder, arch.hf_architecture):
        yield Finding(
            f"transformers 5 splits text for {hf_path} as Qwen2's tokenizer does, not as the "
            "model's tokenizer does; token ids can differ.",
            "none needed for a run, which uses transformers 4; with version 5, load the exported "
            "tokenizer with PreTrainedTokenizerFast instead of AutoTokenizer",
            is_error=False,
        )
    too_large = [(i, token) for token, i in vocabulary.items() if i >= arch.vocab_size]
    if too_large:
        first_id, token = min(too_large, key=lambda id_and_token: id_and_token[0])
        yield Finding(
            f"the tokenizer of {hf_path} has {len(too_large)} tokens without an embedding; the "
            f"first is {token!r} with id {first_id} (vocab_size={arch.vocab_size}).",
            "use the tokenizer that the model was trained with, or resize the embeddings "
            "(resize_token_embeddings) and save the model",
        )


def _list_names(names: Iterable[str]) -> str:
    """Joins the first three names, and adds the number of the others."""
    ordered = sorted(names)
    others = f" and {len(ordered) - 3} other weights" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + others
