"""Builds, saves, restores and reads NeMo 2 checkpoints.

A checkpoint is a directory ``<name>.nemo`` with ``weights/`` (Megatron's torch_dist format) and
``context/`` (NeMo's serialised model config; tokenizer, templates and generation config in
``context/hf``). Stock NeMo loads it without this repository.
"""

from __future__ import annotations

import lzma
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from nemo_convert.architecture import Architecture
from nemo_convert.families import FAMILIES
from nemo_convert.generation_config import SAMPLING, TOKEN_IDS
from nemo_convert.hf import copy_side_files
from nemo_convert.hf_config import as_transformers_4, read_architecture, rope_theta
from nemo_convert.pipeline import pipeline_split
from nemo_convert.sharded import read_sharded
from nemo_convert.trust import explain_damage, require_known_context, require_no_remote_code
from recipes.backend.device import COLLECTIVE_TIMEOUT, collective_backend, device, select_gpu
from recipes.backend.local_layers import adapt_config
from recipes.backend.without_cuda import enable
from recipes.core.errors import RecipeError
from recipes.core.files import read_json, storage_problem, write_json
from recipes.core.processes import interrupts_delayed

if TYPE_CHECKING:
    import torch

WEIGHTS, CONTEXT, SIDE = "weights", "context", "hf"
"""Directories of a checkpoint. ``SIDE`` is in ``CONTEXT`` and has the Hugging Face side files."""
STEPS = "steps"
"""Directory in a training run's artifact with the checkpoints of steps before the last."""
EXTRA_STATE = "_extra_state"
"""Suffix of the names under which TransformerEngine's modules store FP8 state."""
SEED = 1234  # NeMo's default


@dataclass(frozen=True)
class Parallelism:
    """Megatron's parallel sizes."""

    tensor: int = 1
    pipeline: int = 1


def initialize(parallel: Parallelism) -> None:
    """Sets up torch.distributed and Megatron's process groups, with or without torchrun."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    enable()  # patches for a machine without CUDA or TransformerEngine
    if not torch.distributed.is_initialized():
        options: dict[str, Any] = {"timeout": COLLECTIVE_TIMEOUT}
        # A single process needs no store that other processes can reach.
        if not torch.distributed.is_torchelastic_launched():
            options |= {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
        if (gpu := select_gpu()) is not None:
            options["device_id"] = gpu
        torch.distributed.init_process_group(collective_backend(), **options)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
        )
        torch.manual_seed(SEED)
        model_parallel_cuda_manual_seed(SEED)


def tensor_group() -> Any:
    """Returns the tensor-parallel group, or ``None`` if its size is 1."""
    from megatron.core import parallel_state

    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return None
    return parallel_state.get_tensor_model_parallel_group()


def open_checkpoint(path: Path, scratch: Path) -> Path:
    """Returns a checkpoint's directory; unpacks a ``.nemo`` file into ``scratch``.

    Raises:
        RecipeError: ``path`` is not a NeMo 2 checkpoint, or is an archive that is damaged or that
            would write files outside ``scratch``.
    """
    folder = scratch if path.is_file() else path
    if path.is_file():
        try:
            with tarfile.open(path) as archive:
                archive.extractall(folder, filter="data")
        except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            if problem := storage_problem(error, scratch.parent):
                raise problem from error
            reason = str(error).partition("\n")[0]  # the first line
            raise RecipeError(
                f"{path} cannot be unpacked safely: {reason}",
                "copy it again if it is incomplete; do not use it if it writes outside its folder, "
                "or if it is not a .nemo file (a tar archive)",
            ) from error
    if not (folder / WEIGHTS).is_dir() or not (folder / CONTEXT / "io.json").is_file():
        raise RecipeError(
            f"{path} is not a NeMo 2 checkpoint: it needs {WEIGHTS}/ and {CONTEXT}/io.json.",
            "convert a Hugging Face model first: python -m nemo_convert to-nemo SRC DST",
        )
    return folder


def find_checkpoint(artifact: Path) -> Path:
    """Returns the first checkpoint directory, by name, in the artifact directory of a stage."""
    return next(path for path in sorted(artifact.glob("*.nemo")) if path.is_dir())


def step_checkpoints(artifact: Path) -> dict[int, Path]:
    """Maps each step before the last, in order, to its checkpoint in a training artifact."""
    checkpoints = {int(path.stem): path for path in (artifact / STEPS).glob("*.nemo")}
    return dict(sorted(checkpoints.items()))


def pack(checkpoint: Path, file: Path) -> None:
    """Packs a checkpoint into one ``.nemo`` file, uncompressed, since weights do not compress."""
    partial = file.with_name(file.name + ".partial")
    with tarfile.open(partial, "w") as archive:
        for folder in (CONTEXT, WEIGHTS):
            archive.add(checkpoint / folder, arcname=folder)
    partial.replace(file)


def read_config(checkpoint: Path) -> dict[str, Any]:
    """Reads the Hugging Face ``config.json`` in a checkpoint, as transformers 4 spells it.

    Raises:
        RecipeError: The file is invalid. Or it is absent: NeMo's own importer does not write it.
    """
    file = side_folder(checkpoint) / "config.json"
    if not file.is_file():
        raise RecipeError(
            f"{checkpoint} has no {CONTEXT}/{SIDE}/config.json.",
            "use a checkpoint that this repository wrote, or copy the model's config.json and "
            "tokenizer files there",
        )
    return as_transformers_4(read_json(file), str(file))


def side_folder(checkpoint: Path) -> Path:
    """Returns the folder of a checkpoint's side files (tokenizer, templates, configs)."""
    return checkpoint / CONTEXT / SIDE


def architecture_of(checkpoint: Path) -> Architecture:
    """Returns the architecture that a checkpoint's Hugging Face config describes."""
    return read_architecture(read_config(checkpoint), str(checkpoint))


def import_nemo() -> None:
    """Imports NeMo. Without the delay, an interrupt could cause another error in its imports."""
    with interrupts_delayed():
        enable()
        import_module("nemo.collections.llm")


def new_model(hf_folder: Path) -> Any:
    """Makes a NeMo model (config and tokenizer, no weights) for a Hugging Face folder.

    NeMo copies ``hf_folder`` to the context: the folder must be named ``hf`` and have no weights.
    """
    enable()  # without TransformerEngine, importers need patches
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from nemo.lightning import io

    hf_config = read_json(hf_folder / "config.json")
    arch = read_architecture(hf_config, str(hf_folder))
    family = FAMILIES[arch.hf_architecture]
    _record_arguments()
    importer = resolve_name(family.importer)(str(hf_folder))
    # The Qwen importers read this attribute. NeMo sets it only when it converts weights.
    importer.trust_remote_code = False
    with _readable_generation_config(hf_folder):
        config = importer.config
    # The context stores __io__, the record of the config. reinit builds the config from __io__.
    fields = {**_fields_that_importers_omit(arch), "rotary_base": rope_theta(hf_config)}
    for name, value in {**fields, **family.corrections(hf_config)}.items():
        setattr(config.__io__, name, value)
    return resolve_name(family.model)(io.reinit(config), tokenizer=AutoTokenizer(str(hf_folder)))


def _record_arguments() -> None:
    """Makes NeMo record the arguments of every config class, since the context stores them.

    NeMo sets ``__wrapped_init__`` on a class whose arguments it records. A subclass inherits the
    attribute. So a Qwen3Config that is made after a Qwen2Config would have no record.
    """
    from nemo.collections.llm import GPTConfig

    classes = GPTConfig.__subclasses__()
    for derived in classes:
        classes += derived.__subclasses__()  # the loop also visits these appended classes
        if "__init__" in vars(derived) and "__wrapped_init__" not in vars(derived):
            derived.__wrapped_init__ = False  # hides the inherited attribute


@contextmanager
def _readable_generation_config(hf_folder: Path) -> Iterator[None]:
    """Temporarily replaces the generation config with one that NeMo can read and write.

    Most importers need the file, but base models do not have it. transformers refuses to write some
    files that it reads: those with sampling settings but no ``do_sample`` (Llama 2's), or a length
    penalty but no beams. So NeMo gets only ``TOKEN_IDS``, and with ``do_sample`` also ``SAMPLING``.
    """
    file = hf_folder / "generation_config.json"
    original = file.read_bytes() if file.exists() else None
    settings = read_json(file) if original else {}
    names = (*TOKEN_IDS, "do_sample", *SAMPLING) if settings.get("do_sample") else TOKEN_IDS
    writable = {key: value for key, value in settings.items() if key in names}
    if (writable.get("pad_token_id") or 0) < 0:  # transformers refuses to write a negative id
        del writable["pad_token_id"]
    write_json(file, writable)
    try:
        yield
    finally:
        if original is None:
            file.unlink()
        else:
            file.write_bytes(original)


def _fields_that_importers_omit(arch: Architecture) -> dict[str, Any]:
    """Returns values for the fields of NeMo's config that at least one importer does not set."""
    fields = {
        "kv_channels": arch.kv_channels,
        "vocab_size": arch.vocab_size,
        "seq_length": arch.max_position_embeddings,
        "share_embeddings_and_output_weights": arch.tied_embeddings,
    }
    if arch.num_moe_experts:
        experts = ("num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size")
        fields |= {name: getattr(arch, name) for name in experts}
    return fields


def restore_model(checkpoint: Path) -> Any:
    """Builds the NeMo model of a checkpoint, without weights.

    Raises:
        RecipeError: The context is damaged, or opening it could run unknown code.
    """
    import fiddle
    from nemo.lightning.io import load_context

    with explain_damage(checkpoint / CONTEXT):
        require_known_context(checkpoint / CONTEXT / "io.json")
        _record_arguments()
        config = load_context(checkpoint / CONTEXT, subpath="model", build=False)
        require_no_remote_code(config, checkpoint)
        return fiddle.build(config)


def build_core(
    model: Any,
    parallel: Parallelism,
    params_dtype: torch.dtype | None = None,
    training: bool = False,  # local layers are then faster, but ModelOpt cannot prune them
) -> Any:
    """Builds this rank's Megatron ``GPTModel`` for a NeMo model, with uninitialised weights."""
    config = adapt_config(model.config, training)
    config.tensor_model_parallel_size = parallel.tensor
    config.pipeline_model_parallel_size = parallel.pipeline
    split_pipeline(config)
    config.perform_initialization = False
    if params_dtype is not None:
        config.params_dtype = params_dtype
    config.pipeline_dtype = config.params_dtype
    # Megatron's local norms on the CPU ignore params_dtype: they are float32 until to() casts them.
    return config.configure_model(model.tokenizer).to(device(), config.params_dtype)


def split_pipeline(config: Any) -> None:
    """Sets the sizes of the first and last pipeline stage, unless all stages are equally large."""
    split = pipeline_split(config.num_layers, config.pipeline_model_parallel_size)
    if len(set(split)) > 1:
        config.num_layers_in_first_pipeline_stage = split[0]
        config.num_layers_in_last_pipeline_stage = split[-1]


def load_weights(core: torch.nn.Module, checkpoint: Path) -> None:
    """Loads a checkpoint of any parallel layout into this rank's model.

    Skips the FP8 states of TransformerEngine's modules, including the numbered ones of experts,
    because a checkpoint that was written without TransformerEngine does not have them.
    """
    state = core.sharded_state_dict(prefix="module.")
    without_fp8 = {name: item for name, item in state.items() if EXTRA_STATE not in name}
    tensors = read_sharded(without_fp8, checkpoint / WEIGHTS)
    weights = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    # strict=False allows the skipped FP8 states. read_sharded has already refused missing weights.
    core.load_state_dict(weights, strict=False)


def save_checkpoint(
    checkpoint: Path, model: Any, core: torch.nn.Module, side: Path, rank: int, strategy: Any = None
) -> None:
    """Writes a checkpoint: each rank writes its weights, and rank 0 also writes the context.

    The context has the ``__io__`` config of ``model`` and the files of the folder ``side``. Weights
    are those of ``core``, this rank's Megatron model, unless Megatron's ``strategy`` replaces them.
    """
    from megatron.core import dist_checkpointing

    (checkpoint / WEIGHTS).mkdir(parents=True, exist_ok=True)
    state = _with_norm_states(core.sharded_state_dict(prefix="module."))
    dist_checkpointing.save(state, str(checkpoint / WEIGHTS), strategy)
    if rank == 0:
        write_context(checkpoint, model, side)


def _with_norm_states(state: dict[str, Any]) -> dict[str, Any]:
    """Adds the empty ``_extra_state`` of TransformerEngine's norms, which stock NeMo requires."""
    from megatron.core.dist_checkpointing import ShardedObject

    norms = {}
    for name, item in state.items():
        if item.key.endswith("norm.weight"):  # not …_norm_weight, a norm fused into a linear layer
            axes = item.prepend_axis_num  # 1 if all layers are stacked in one tensor, else 0
            norms[name.replace("weight", EXTRA_STATE)] = ShardedObject(
                item.key.replace("weight", EXTRA_STATE),
                None,  # data
                item.global_shape[:axes] or (1,),  # one object per layer, or one in all
                item.global_offset[:axes] or (0,),
                item.replica_id,
            )
    return {**norms, **state}


def write_context(checkpoint: Path, model: Any, side: Path) -> None:
    """Writes ``context/`` for a model, with the side files and tokenizer in folder ``side``."""
    from nemo import lightning as nl
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from nemo.lightning.io.pl import TrainerContext

    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as temporary:
        staged = Path(temporary) / SIDE
        copy_side_files(side, staged)
        # NeMo cannot copy a directory.
        shutil.rmtree(staged / "additional_chat_templates", ignore_errors=True)
        model.tokenizer = AutoTokenizer(str(staged))
        model.__io__.tokenizer = model.tokenizer.__io__
        with outside_slurm():
            trainer = nl.Trainer(devices=1, accelerator="cpu", strategy=nl.MegatronStrategy())
        context = TrainerContext(model=model, trainer=trainer, extra={})
        shutil.rmtree(checkpoint / CONTEXT, ignore_errors=True)
        context.io_dump(checkpoint / CONTEXT, yaml_attrs=["model"])
        copy_side_files(side, side_folder(checkpoint))  # includes the directory of chat templates


@contextmanager
def outside_slurm() -> Iterator[None]:
    """Hides a Slurm job from a new trainer, which would expect one rank per task of the job."""
    tasks = os.environ.pop("SLURM_NTASKS", None)
    try:
        yield
    finally:
        if tasks is not None:
            os.environ["SLURM_NTASKS"] = tasks


def leading_axes(arch: Architecture) -> dict[str, int]:
    """Maps each checkpoint key to the number of its tensor's leading axes (layer, expert)."""
    weights = FAMILIES[arch.hf_architecture].weights
    return {weight.checkpoint_key: len(weight.stack_sizes(arch)) for weight in weights}


def read_weights(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the Megatron name and the tensor of each weight."""
    from nemo_convert import streaming

    arch = architecture_of(checkpoint)
    weights = {w.checkpoint_key: w for w in FAMILIES[arch.hf_architecture].weights}
    for key, index, tensor in streaming.read_weights(checkpoint / WEIGHTS, leading_axes(arch)):
        indices = dict(zip(weights[key].stack_sizes(arch), index, strict=True))  # {"i": layer, …}
        yield weights[key].megatron.format(**indices), tensor
