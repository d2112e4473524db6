"""Lists the rules that a plan checks, with their reasons. ``run.py doctor rules`` prints them.

The checks themselves are in each stage's ``check``, in this package and in ``launch``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial

from recipes.core.errors import RecipeError

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class Rule:
    """A rule that a plan checks."""

    name: str
    """Name in messages and in the setting ``skip_rules``."""
    reason: str
    """Why the rule exists."""
    reference: str = ""
    """Issues on GitHub, files of libraries, or papers that document the reason."""
    severity: str = ERROR
    """``ERROR``: a broken rule stops the run. Otherwise ``WARNING``."""


@dataclass(frozen=True)
class Problem:
    """A rule that a recipe breaks."""

    rule: Rule
    what: str
    """What is wrong, with the setting and its value."""
    fix: str
    """What the user can change."""

    def __str__(self) -> str:
        see = f"\n  see: {self.rule.reference}" if self.rule.reference else ""
        return f"{self.what}\n  fix: {self.fix}   [{self.rule.name}]{see}"


def has_error(problems: Iterable[Problem]) -> bool:
    """Returns whether at least one problem is an error, not a warning."""
    return any(problem.rule.severity == ERROR for problem in problems)


def refuse_errors(
    problems: Iterable[Problem], skipped: Collection[str] = ()
) -> tuple[Problem, ...]:
    """Returns warnings and skipped errors, without duplicates; raises all other errors.

    Args:
        problems: Problems of a plan.
        skipped: Names of the rules whose errors do not stop the run.

    Raises:
        RecipeError: A problem is an error whose rule is not skipped. The message lists all of them.
    """
    unique = tuple(dict.fromkeys(problems))
    errors = [str(p) for p in unique if p.rule.severity == ERROR and p.rule.name not in skipped]
    if errors:
        raise RecipeError("\n".join(errors), fix="")  # each error includes its own fix
    return unique


def first_problems(problems_by_shape: Iterable[Iterable[Problem]]) -> list[Problem]:
    """Returns the problems of the first shape that has a problem; none if no shape has one."""
    return next(filter(None, map(list, problems_by_shape)), [])


_warning = partial(Rule, severity=WARNING)
_MODELOPT = "NVIDIA/Model-Optimizer"
_BRIDGE = "NVIDIA-NeMo/Megatron-Bridge"
_NEMO = "NVIDIA-NeMo/Speech"

# Machine and stack
STACK_VERSIONS = Rule(
    "stack-versions",
    "untested versions of libraries may fail during a run, or change a result",
    f"{_BRIDGE}#1646, #5192; {_MODELOPT}#2257, #1637",
)
DISK = Rule("disk", "a full disk ends a training run at its first checkpoint")
MEMORY = Rule(
    "memory",
    "models, optimizer states, activations and logits of a rank must fit into its memory",
    "pytorch/torchtune#2213",
)
TIME_LIMIT = _warning("time-limit", "a job that reaches its time limit is queued again")
REQUEUES = Rule("requeues", "a stage must end within its job's time limit and requeues")
IMAGE = Rule("image", "every job needs its container image")
ENGINE_IMAGE = Rule(
    "engine-image",
    "only NVIDIA's image has TensorRT-LLM, and without it a run would fail at its last stages",
)
MOUNTS = Rule("mounts", "a stage in a container sees only mounted paths")
CPUS_PER_TASK = _warning(
    "cpus-per-task", "by default, a job that shares nodes gets one core for all its processes"
)
MPI = _warning("mpi", "in a Slurm job, only mpirun can start TensorRT-LLM's MPI processes")
JOB = Rule("job", "a job must request the cores and GPUs that its processes use")
JOB_MEMORY = _warning("job-memory", "Slurm kills a job that uses more memory than it requested")
PARTITION = Rule("partition", "Slurm never starts a job that exceeds the limits of its partition")
GPUS = Rule("gpus", "each process of a stage on GPUs needs its own GPU")
HOST_MEMORY = _warning(
    "host-memory",
    "saving a checkpoint gathers a rank's optimizer state in the machine's memory; without enough "
    "memory, the kernel kills the run",
)
CLUSTER_HARDWARE = Rule(
    "cluster-hardware",
    "with a CPU's profile, jobs on GPUs would use a CPU's precision, and estimates would be wrong",
)
CPU_PRECISION = _warning(
    "cpu-precision",
    "bfloat16 is twice as fast as float32 on CPUs that have it, and emulated on others",
)
HARDWARE_PROFILE = _warning(
    "hardware-profile", "memory and time are estimated for the profile, not for this machine"
)
BUNDLED_CONFIG = _warning(
    "bundled-config", "a bundled copy of config.json may differ from the model's own"
)

# Model
MODEL = Rule("model", "checks, plan and report use model.hf_path, so a stage must import it")
CHECKPOINT = Rule(
    "checkpoint",
    "weights, tokenizer and generation config must fit config.json; what does not fit fails late, "
    "or changes the model silently",
    f"{_NEMO}#12497, #12545; {_BRIDGE}#1420",
)
CHECKPOINT_NOTE = _warning("checkpoint-note", "the converted model differs from its config.json")
VOCABULARY = Rule(
    "vocabulary",
    "tensor parallelism splits the vocabulary, and entries that pad it would get into export and "
    "loss",
    f"{_BRIDGE}#625, #1853; {_NEMO}#14870",
)
TOKENIZER = Rule(
    "tokenizer",
    "a loss on logits compares tokens by id: with two vocabularies it is noise",
    f"{_MODELOPT}#2489; pytorch/torchtune#2119",
)
LICENCE = _warning(
    "licence", "commercial use of a student needs text and a teacher whose licences allow it"
)

# Data
DATA_SOURCES = Rule("data-sources", "unreadable text would stop the run after the import")
SOURCE_WEIGHTS = _warning("source-weights", "prepared text does not include the sources' weights")
CHAT = Rule("chat", "the loss is on the assistant's whole answers, found by the chat template")
DOCUMENT_END = Rule(
    "document-end",
    "an end-of-document token that is not in the tokenizer would stop the run after the import",
)
DATA_SPLITS = Rule("data-splits", "every split of the text needs documents")
SEQ_LENGTH = Rule("seq-length", "the teacher was not trained on positions beyond its limit")
TOKENS = Rule("tokens", "the text must fill at least one global batch")
UNKNOWN_TEXT = _warning(
    "unknown-text", "hours and disk space are planned only for text of known size"
)
EPOCHS = _warning("epochs", "a model learns little from a text after 4 epochs", "arXiv:2305.16264")

# Pruning
PRUNE_TARGET = Rule(
    "prune-target",
    "ModelOpt silently skips an axis whose target is not among its choices",
    f"{_MODELOPT}#2159",
)
LARGE_REDUCTION = _warning(
    "large-reduction",
    "one distillation recovers a removal of up to a third of the parameters",
    f"{_MODELOPT}, examples/pruning/README.md; arXiv:2407.14679",
)
TRANSFORMERS_5 = _warning(
    "transformers-5",
    "transformers 5 refuses a Llama model whose hidden size its attention heads do not divide",
    "transformers 5.24.0, models/llama/configuration_llama.py",
)
SEARCHED_SHAPE = _warning("searched-shape", "the search chooses the shape after the plan")
LAYER_IMPORTANCE = Rule("layer-importance", "layers are chosen by a score that must be measured")
HEALING = Rule(
    "healing", "least squares need text, and each expert of an MoE sees too little of it"
)
ADDED_LAYERS = Rule(
    "added-layers",
    "the teacher's layers fit a student that has all of the teacher's channels, heads and experts",
    "arXiv:2510.05064",
)
CALIBRATION = Rule(
    "calibration", "importance scores that are measured on padding or noise are random"
)
BUDGET = Rule("budget", "a search needs a budget, and a shape that is within the budget")
REPORT = Rule(
    "report",
    "a report needs all inputs of a distillation, a search, or both; a model card describes the "
    "model that was measured",
)
SEARCH = Rule("search", "ranking and successive halving need candidates, text and steps")
SLOW_SIZES = _warning(
    "slow-sizes",
    "GEMMs are slow if a dimension on a rank is not a multiple of 16, and impossible in FP8",
)
ONE_RANK = Rule("one-rank", "the stage supports only one process", f"{_NEMO}#11531")

# Layout
RANKS = Rule("ranks", "TP x PP x CP must divide the number of ranks")
BATCH = Rule("batch", "a global batch is a whole number of micro batches on every replica")
TENSOR_PARALLEL = Rule(
    "tensor-parallel", "all ranks hold equal numbers of heads, groups and feed-forward channels"
)
TENSOR_NODES = _warning(
    "tensor-nodes",
    "tensor parallelism communicates in every layer, and the network between nodes is slower than "
    "the links within a node",
)
PIPELINE_PARALLEL = Rule(
    "pipeline-parallel", "every stage holds at least one layer", f"{_BRIDGE}#1727"
)
SEQUENCE_PARALLEL = Rule("sequence-parallel", "every rank holds an equal shard of a sequence")
CONTEXT_PARALLEL = Rule(
    "context-parallel",
    "each rank holds two chunks of a sequence, and only TransformerEngine's attention supports it",
)
EXPERT_PARALLEL = Rule("expert-parallel", "experts are split over the replicas", f"{_BRIDGE}#1727")
OPTIMIZER_INSTANCES = Rule(
    "optimizer-instances",
    "each copy of the optimizer's state is split over an equal number of replicas",
)
RECOMPUTE = Rule(
    "recompute",
    "recomputed layers return no hidden states, and only modules of the model can be recomputed",
)
SIZE_RULES = frozenset(
    {
        *(MODEL, PRUNE_TARGET, ADDED_LAYERS, BUDGET, SEARCH, RANKS, BATCH, TENSOR_PARALLEL),
        *(PIPELINE_PARALLEL, SEQUENCE_PARALLEL, CONTEXT_PARALLEL, EXPERT_PARALLEL),
        OPTIMIZER_INSTANCES,
    }
)
"""Rules on shapes and layouts. If one is broken, memory and time cannot be estimated."""
UNCHECKED_LIMITS = _warning(
    "unchecked-limits", "memory, time and text can only be checked for valid shapes and layouts"
)

# Training
FP8 = Rule("fp8", "FP8 needs TransformerEngine, a GPU that has it, and aligned sizes")
COMPILER = Rule("compiler", "kernels for a CPU need a C++ compiler and Python's headers")
PROFILE = Rule("profile", "the profiler can only trace steps of the training")
SCHEDULE = Rule("schedule", "NeMo stops if the learning rate cannot reach its peak or minimum")
LOSS = Rule(
    "loss",
    "without a term on logits, the output layer has no gradient, and Megatron fails; a prepared "
    "teacher costs time, so the loss must use it",
)
NO_EFFECT = Rule(
    "no-effect", "a changed setting of something that the training does not have is a mistake"
)
STOP = Rule("stop", "a training run can only stop early by a metric that its validations measure")
STUDENT_STEPS = Rule("student-steps", "student_steps can only be steps before the last")
HIDDEN_PAIRS = Rule(
    "hidden-pairs",
    "the last pipeline stage computes the loss, so the layers that it compares must be on it",
    f"{_NEMO}#13557",
)
HIDDEN_RANGE = _warning(
    "hidden-range",
    "ModelOpt computes losses only on the last pipeline stage, so they compare only its layers",
)
CACHED_TEACHER = Rule(
    "cached-teacher",
    "a cache of logits is valid for one temperature, top-k and sequence length, and for the "
    "sequences that it has",
)
TOP_K = Rule("top-k", "the teacher's top_k tokens must be fewer than its vocabulary")
EVALUATE = Rule("evaluate", "a prompt must be shorter than the sequence that it begins")

# Engines and benchmarks
FORMAT = Rule("format", "each backend supports only some formats of weights")
KV_CACHE = Rule("kv-cache", "engines support few types of KV cache; FP8 needs calibrated scales")
MAX_SEQ_LEN = Rule("max-seq-len", "an engine cannot serve more positions than the model has")
MAX_INPUT_LEN = Rule("max-input-len", "a prompt must be shorter than the engine's max_seq_len")
ENGINE_MODEL = Rule(
    "engine-model", "an engine that computes another model than its checkpoint fails silently"
)
HEAD_SIZE = Rule("head-size", "attention kernels exist for few head sizes")
ALIGNMENT = Rule("alignment", "kernels of a precision need aligned sizes")
LENGTH = Rule("length", "prompt and new tokens must fit the model's positions")
ENGINE_LIMITS = Rule(
    "engine-limits",
    "beyond its limits, an engine refuses requests, or computes their prompts in several steps",
)
ENGINE_PAIR = Rule("engine-pair", "a speed-up compares two engines of the same type")
TASKS_HARNESS = Rule("tasks-harness", "the benchmarks were verified with one version of lm-eval")
TASKS_NAMES = Rule("tasks-names", "an unknown benchmark would fail after the training")
TASKS_FEWSHOT = Rule("tasks-fewshot", "num_fewshot is set by the name of a benchmark")
SERVED = Rule(
    "served",
    "a server must be installed, and must return what the benchmarks need; it must serve the "
    "student",
)
SERVED_TIME = _warning("served-time", "on a CPU, a served model needs longer than planned")
GATES = Rule("gates", "a gate limits a metric, which a stage of the run must measure")

# ``vars()`` has all names that this module has defined so far, in their order.
RULES = {rule.name: rule for rule in list(vars().values()) if isinstance(rule, Rule)}
"""All rules by name."""
