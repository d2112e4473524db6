"""One rank of one stage: the stage's own ``run``, on a device that is not there."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import random
from megatron.core.transformer import cuda_graphs
from megatron.core.transformer.dot_product_attention import DotProductAttention
from nemo.collections.llm.gpt.data import pre_training
from nemo.collections.llm.gpt.model import base
from nemo.lightning.callback_group import CallbackGroup
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import no_init_weights

from nemo_convert import parity
from recipes.core.deadline import DEADLINE, StoppedByClockError
from recipes.core.manifest import ARTIFACT, WORK
from recipes.distillation import losses, objective
from recipes.evaluation import predictions
from recipes.pruning import scoring
from recipes.rehearsal import checkpoints, device, experts, fake_cuda, materials
from recipes.rehearsal.job import RankJob, Rehearsed
from recipes.rehearsal.memory import MemoryTracker
from recipes.rehearsal.messages import Checked
from recipes.stages.contract import Stage

FRAMES = 5
TEACHER_MODULE = "_teacher_model."
"""In the names of the weights of ModelOpt's teacher."""


def stand_in() -> None:
    """Replaces what needs weights or other ranks, for good."""
    checkpoints.stand_in()
    experts.stand_in()
    losses.CHUNK_BYTES[fake_cuda.NAME] = losses.CHUNK_BYTES["cuda"]
    begin = objective.LossReduction.__init__

    def __init__(self: Any, what: objective.Objective) -> None:  # noqa: N807
        """The first pipeline stage has its losses from the last, which is not there to tell."""
        begin(self, what)
        self.last = dict.fromkeys(("loss", *what.weights), 1.0)

    setattr(objective.LossReduction, "__init__", __init__)
    setattr(DotProductAttention, "__init__", _of_its_part(DotProductAttention.__init__))
    for module in (base, pre_training):  # with TransformerEngine, NeMo makes no mask and asks none
        setattr(module, "HAVE_TE", True)
    # Graphs are captured by CUDA, with random numbers of TransformerEngine's; here layers run on.
    setattr(cuda_graphs._CudagraphGlobalRecord, "create_cudagraphs", lambda: None)
    setattr(cuda_graphs.ArgMetadata, "__init__", _as_tensor(cuda_graphs.ArgMetadata.__init__))
    setattr(random, "initialize_rng_tracker", _for_graphs(random.initialize_rng_tracker))
    # NeMo makes a mesh of the ranks before it looks whether anything is sharded by one. A mesh is
    # looked for among the numbers of ranks, and tensors have none here.
    setattr(DeviceMesh, "from_group", lambda *args, **kwargs: None)
    # Transformers runs on the CPU here; and what has no numbers is no proof of a conversion.
    setattr(parity, "load_causal_lm", _causal_lm)
    setattr(parity.Parity, "require", lambda found, what: found)


def _as_tensor(begin: Callable[..., None]) -> Callable[..., None]:
    """Takes a weightless tensor for a tensor, whose type is compared."""

    def __init__(self: Any, arg: object) -> None:  # noqa: N807
        begin(self, arg)
        if isinstance(arg, Tensor):
            self.type = Tensor

    return __init__


def _for_graphs(begin: Callable[..., None]) -> Callable[..., None]:
    """Says that random numbers can be captured where TransformerEngine's are asked for."""

    def initialize(use_te_rng_tracker: bool = False, *args: object, **kwargs: object) -> None:
        begin(use_te_rng_tracker, *args, **kwargs)
        if use_te_rng_tracker:
            random._CUDA_RNG_STATE_TRACKER.is_inference_rng_tracker = True

    return initialize


def _of_its_part(begin: Callable[..., None]) -> Callable[..., None]:
    """Attention over several ranks is TransformerEngine's; here each looks at its own part."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        context, config.context_parallel_size = config.context_parallel_size, 1
        begin(self, config, *args, **kwargs)
        config.context_parallel_size = context

    return __init__


def _causal_lm(folder: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def rehearse(job: RankJob) -> Rehearsed:
    """Runs the stage once; an error is a finding."""
    os.environ.update(environment(job))
    stage: Stage[Any] = importlib.import_module(f"recipes.stages.{job.stage}").STAGE
    checked, memory = Checked(), MemoryTracker(job.vocabulary)
    began = time.monotonic()
    error = None
    with tempfile.TemporaryDirectory() as temporary:
        run_dir = Path(temporary)
        out = run_dir / job.name / WORK / ARTIFACT
        out.mkdir(parents=True)
        try:
            inputs = materials.inputs(job, run_dir)
            cfg = OmegaConf.merge(
                OmegaConf.structured(stage.config), materials.settings(job, run_dir)
            )
            run = partial(stage.run, OmegaConf.to_object(cfg), inputs, out)
            _name_what_stays(memory)
            with device.weightless(), memory, checked:
                if job.resumed:
                    _stop_by_the_clock(run)
                run()
        except Exception:
            error = _told()
    return Rehearsed(
        seconds=round(time.monotonic() - began, 1),
        error=error,
        peak={kind: size for kind, size in memory.peak.items() if size},
        sent=checked.sent,
        expected=checked.expected,
    )


def _stop_by_the_clock(run: Callable[[], object]) -> None:
    """Runs a training whose time is up: it saves after its first step."""
    os.environ[DEADLINE] = "0"
    with suppress(StoppedByClockError):
        run()
    del os.environ[DEADLINE]
    RotaryEmbedding.forward.cache_clear()  # which has the model that it was called for
    for callback in CallbackGroup.get_instance().callbacks:  # which NeMo has for the whole process
        del callback.log, callback.log_dict  # methods of the model, from Lightning
    _empty_optimizers()
    gc.collect()


def _empty_optimizers() -> None:
    """A float32 model's holds views of weights, whose graph has hooks that hold the model."""
    for held in gc.get_objects():
        if issubclass(type(held), DistributedOptimizer):
            vars(held).clear()


def _told() -> str:
    """The error at hand, and where it was, without the frames of what replaces the device."""
    _, error, where = sys.exc_info()
    frames = [
        frame
        for frame in traceback.extract_tb(where)
        if "/torch/" not in frame.filename and "/recipes/rehearsal/" not in frame.filename
    ]
    return "".join(traceback.format_list(frames[-FRAMES:])) + f"{type(error).__name__}: {error}"


def environment(job: RankJob) -> dict[str, str]:
    """What torchrun would tell the rank."""
    return {
        "RANK": str(job.rank),
        "LOCAL_RANK": str(job.rank % job.devices),
        "WORLD_SIZE": str(job.world),
        "LOCAL_WORLD_SIZE": str(job.devices),
        "GROUP_RANK": str(job.rank // job.devices),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "rehearsal",
    }


def _name_what_stays(memory: MemoryTracker) -> None:
    """Tells weights, gradients and optimizer states from activations, as they come to be used."""
    seen: WeakSet[nn.Module] = WeakSet()  # a model that is gone may leave its ids to the next
    stepped = False

    def before_forward(module: nn.Module, args: object) -> None:
        if module not in seen:
            seen.add(module)
            _name_weights(memory, module)

    def after_step(optimizer: Optimizer, *args: object) -> None:
        nonlocal stepped
        _name_states(memory, optimizer)
        if not stepped:
            memory.begin()  # the next step is like all that follow
        stepped = True

    load = Optimizer.load_state_dict

    def load_and_name(optimizer: Optimizer, state: Any) -> None:
        load(optimizer, state)
        _name_states(memory, optimizer)

    setattr(Optimizer, "load_state_dict", load_and_name)
    head = _named_head(memory, predictions.float32_head)
    for module in (predictions, scoring):
        setattr(module, "float32_head", head)
    nn.modules.module.register_module_forward_pre_hook(before_forward)
    register_optimizer_step_post_hook(after_step)


def _named_head(memory: MemoryTracker, make: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Makes heads of what only reads: no module multiplies by them, or by their copies."""

    def float32_head(weight: Tensor) -> Any:
        memory.name("weights", [weight])
        with memory.making("weights"):
            return make(weight)

    return float32_head


def _name_states(memory: MemoryTracker, optimizer: Optimizer) -> None:
    for main in (weight for group in optimizer.param_groups for weight in group["params"]):
        states = optimizer.state.get(main, {}).values()  # which it asks for to make them
        memory.name("optimizer", (s for s in states if isinstance(s, Tensor)))
        if not main._is_view():  # as it is of the model's own weights, in float32
            memory.name("optimizer", [main])


def _name_weights(memory: MemoryTracker, module: nn.Module) -> None:
    for name, weight in module.named_parameters():
        memory.name("teacher" if TEACHER_MODULE in name else "weights", [weight])
    if isinstance(module, DistributedDataParallel):
        for buffer in (*module.buffers, *module.expert_parallel_buffers):
            memory.name("gradients", [buffer.grad_data])
