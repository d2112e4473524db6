"""Where models run, and everything that differs by it: one list, and what stands in for a GPU.

What a model is made of and how it is trained is the same on a CPU and on GPUs wherever gloo and
Megatron's own layers can do it: distributed optimizer, overlapped collectives, reshardable and
asynchronous checkpoints, every layout. What is left is ``DEPENDS``, and what a profile in
``conf/hardware`` says of its device: types to compute in, and rates that only a plan reads.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for each other, for example for one that writes a model."""
PCI_DEVICES = Path("/sys/bus/pci/devices")
QUERIES_AT_ONCE = 128
"""Whose attention a CPU's training layers compute together on their way back."""


def device() -> str:
    """Where models run: on this process's GPU, or on the CPU where there is none."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def collectives() -> str:
    """What ranks talk to each other by."""
    return "nccl" if device() == "cuda" else "gloo"


def use_own_gpu() -> torch.device | None:
    """Gives this rank one GPU of its node, else all would take the first; ``None`` on a CPU.

    The rank moves to the cores near its GPU. torchrun's ``--numa-binding`` needs numactl in the
    image, and ends where a job may not use those cores.
    """
    import torch

    if device() == "cpu":
        return None
    mine = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(mine)
    has = torch.cuda.get_device_properties(mine)
    address = f"{has.pci_domain_id:04x}:{has.pci_bus_id:02x}:{has.pci_device_id:02x}.0"
    stay_near(PCI_DEVICES / address, ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return mine


def stay_near(pci_device: Path, ranks: int) -> None:
    """Moves this process to the cores near a device, if those are its share of the node's.

    Args:
        pci_device: Its folder in ``/sys``; nothing moves if that does not say what is near.
        ranks: How many share the cores that this process may use.
    """
    try:
        listed = (pci_device / "local_cpulist").read_text(encoding="ascii").strip()
    except OSError:
        return
    spans = [span.partition("-") for span in listed.split(",") if span]
    cores = {core for a, _, b in spans for core in range(int(a), int(b or a) + 1)}
    allowed = os.sched_getaffinity(0)
    near = cores & allowed
    if near == allowed or len(near) * ranks < len(allowed):
        return
    for thread in Path("/proc/self/task").iterdir():  # those of imports, too
        os.sched_setaffinity(int(thread.name), near)


def own_layers() -> bool:
    """Whether models are made of Megatron's local and our layers: there is no TransformerEngine."""
    from megatron.core.models.gpt import gpt_layer_specs

    return device() == "cpu" or not gpt_layer_specs.HAVE_TE


@dataclass(frozen=True)
class Dependence:
    """One thing that differs between a CPU and a GPU."""

    place: str
    """Module and function that asks, kept true by a test."""
    difference: str
    stands_in: str
    """The test that shows without a GPU what can be shown; in ``tests/gpu`` where nothing can."""


_BACKEND = "tests/cpu/nemo_convert/test_cpu_backend.py"
_LAYOUTS = "tests/cpu/distillation/test_layouts.py"
_SCORES = "tests/cpu/pruning/test_minitron.py::test_two_pipeline_ranks_give_the_scores_of_one"
_QUALITY = "tests/cpu/evaluation/test_text_quality.py::test_quality_is_measured_by_source"
_RATES = "tests/cpu/chain/test_chain.py::test_engines_of_teacher_and_student_are_built_and_timed"
_ON_GPUS = "tests/gpu/test_training_layouts.py::test_layout_gives_the_losses_of_one_gpu"
DEPENDS = (
    Dependence(
        "nemo_convert.cpu_backend:enable",
        "without CUDA, its names are replaced; without TransformerEngine, what asks for it",
        f"{_BACKEND}::test_no_effect_with_cuda_and_transformer_engine",
    ),
    Dependence(
        "nemo_convert.cpu_backend:adapt_config",
        "TransformerEngine's layers and fused kernels, or ours; where weights are made",
        f"{_BACKEND}::test_cuda_without_transformer_engine_has_the_layers_of_a_cpu",
    ),
    Dependence(
        "nemo_convert.cpu_layers:CausalAttention.forward",
        "the way back of PyTorch's fused attention, or ours, faster on a CPU for short windows",
        "tests/cpu/nemo_convert/test_cpu_layers.py::test_values_and_gradients",
    ),
    Dependence(
        "nemo_convert.nemo:initialize",
        "NCCL on a GPU of each rank's own and on the cores near it, or gloo",
        "tests/cpu/nemo_convert/test_families.py::test_two_ranks_give_transformers_logits",
    ),
    Dependence("nemo_convert.nemo:build_core", "a model of a checkpoint moves to it", _SCORES),
    Dependence(
        "recipes.distillation.trainer:train",
        "each rank takes its own GPU, and the cores near it",
        "tests/unit/nemo_convert/test_device.py::test_a_rank_moves_to_the_cores_near_its_gpu",
    ),
    Dependence(
        "recipes.distillation.trainer:train",
        "a CPU's kernels are compiled by a C++ compiler, which is asked for first",
        "tests/cpu/distillation/test_callbacks.py::test_without_a_compiler_no_training_begins",
    ),
    Dependence(
        "recipes.distillation.training:_on_cpu_here",
        "``compile`` is on by itself on this machine's CPU, from 100 steps on",
        "tests/unit/stages/test_distill.py::test_compiles_where_it_pays",
    ),
    *(
        Dependence(
            f"recipes.distillation.training:{check}",
            f"without a GPU, {what} is refused",
            "tests/unit/launch/test_rules.py::test_each_rule_is_tripped",
        )
        for check, what in (
            ("training_problems", "``tp_comm_overlap``"),
            ("_graph_problems", "``cuda_graphs``"),
            ("_fp8_problems", "``fp8``"),
        )
    ),
    Dependence(
        "recipes.distillation.trainer:_trainer",
        "Lightning's accelerator, and NCCL or gloo",
        f"{_LAYOUTS}::test_two_ranks_give_the_losses_of_one",
    ),
    Dependence(
        "recipes.distillation.data:TrainingData.of", "batches are pinned for the copy", _ON_GPUS
    ),
    Dependence(
        "recipes.distillation.model:KDModel.data_step",
        "a cached teacher's part of a batch moves to it",
        "tests/cpu/chain/test_teachers.py::test_a_cached_teacher_gives_the_live_ones_losses",
    ),
    Dependence(
        "recipes.distillation.objective:LossReduction.reduce",
        "where the zero is made that pipeline stages without a loss report",
        f"{_LAYOUTS}::test_two_ranks_give_the_losses_of_one",
    ),
    Dependence(
        "recipes.distillation.losses:_chunks",
        "logits at a time: as many as a CPU's cache holds, or half a gibibyte",
        "tests/cpu/distillation/test_losses.py::test_no_full_size_float32_tensor_exists",
    ),
    Dependence(
        "recipes.pruning.healing:Decoder.__init__",
        "a layer's weights and residual streams move to it",
        "tests/cpu/pruning/test_healing.py::test_what_is_a_combination_of_what_is_kept_costs_nothing",
    ),
    Dependence("recipes.evaluation.text_quality:with_weights", "the model moves to it", _QUALITY),
    Dependence(
        "recipes.evaluation.task_scores:_question",
        "so does a task's model",
        "tests/cpu/evaluation/test_tasks.py::test_packed_scores_are_those_of_lm_eval",
    ),
    Dependence(
        "recipes.engines.quantization:quantize_folder",
        "so does this model",
        "tests/cpu/engines/test_engines.py::test_quantised_checkpoints",
    ),
    Dependence(
        "recipes.engines.tensorrt_llm:require",
        "its engines are refused without one",
        "tests/unit/engines/test_tensorrt_llm.py::test_what_a_machine_lacks_is_named",
    ),
    Dependence("recipes.engines.machine_rates:best_seconds", "a kernel is waited for", _RATES),
    Dependence(
        "recipes.engines.machine_rates:processor_name", "the GPU's or the CPU's name", _RATES
    ),
    Dependence(
        "launch.machine:cluster_problems",
        "jobs on processors that are not known are warned of float32",
        "tests/unit/launch/test_rules.py::test_each_rule_is_tripped",
    ),
    Dependence(
        "launch.rehearse:too_large",
        "a rehearsed peak is held against the memory of a GPU alone",
        "tests/unit/launch/test_rehearse.py::test_a_peak_without_room_is_a_mistake",
    ),
    Dependence(
        "recipes.core.preloaded:_require_forkable",
        "a process that has begun CUDA must not be forked",
        "tests/unit/core/test_preloaded.py::test_process_that_cannot_be_forked_says_so",
    ),
)
