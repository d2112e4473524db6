"""The rules of preflight: what each is called, how serious it is, why it exists, who was hit by it.

The checks themselves are where the settings are, in each stage's ``check``; this table is what can
be said of a rule without a recipe. ``python launch/run.py doctor rules`` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class Rule:
    """One rule. Errors stop a run before anything starts, warnings are shown with the plan."""

    name: str
    reason: str
    reference: str = ""
    """Upstream issues, by repository, or a paper."""
    severity: str = ERROR


_MODELOPT, _BRIDGE, _NEMO = (
    "NVIDIA/Model-Optimizer",
    "NVIDIA-NeMo/Megatron-Bridge",
    "NVIDIA-NeMo/Speech",
)

# Machine and stack
STACK_VERSIONS = Rule(
    "stack-versions",
    "a version outside the tested set fails in the middle of a run, or changes a result",
    f"{_BRIDGE}#1646, #5192; {_MODELOPT}#2257, #1637",
)
DISK = Rule("disk", "a full disk ends a training at its first checkpoint")
MEMORY = Rule(
    "memory",
    "what a stage holds at once must fit one rank: models, optimizer, activations and logits",
    "pytorch/torchtune#2213",
)
TIME_LIMIT = Rule(
    "time-limit",
    "a job killed at its limit queues again for every part of the work",
    severity=WARNING,
)
IMAGE = Rule("image", "a container that is not there fails every job of the chain")
MOUNTS = Rule("mounts", "a path that is not mounted is not there for the stage")
CPUS_PER_TASK = Rule(
    "cpus-per-task",
    "Slurm gives a job that shares its nodes one core for all processes of a node",
    severity=WARNING,
)
MPI = Rule(
    "mpi",
    "TensorRT-LLM begins with MPI, which ends a job that Slurm has not connected to it",
    severity=WARNING,
)
CLUSTER_HARDWARE = Rule(
    "cluster-hardware",
    "jobs that get GPUs would train in a CPU's precision, and their memory and time would be wrong",
)
CPU_PRECISION = Rule(
    "cpu-precision",
    "bfloat16 products are twice as fast as float32 on CPUs that have them, and emulated on others",
    severity=WARNING,
)
HARDWARE_PROFILE = Rule(
    "hardware-profile",
    "memory and time are estimated for the machine that was named, not for the one found",
    severity=WARNING,
)
BUNDLED_CONFIG = Rule(
    "bundled-config",
    "shapes that came with this repository stand in for a config.json out of reach",
    severity=WARNING,
)

# Model
MODEL = Rule("model", "checks, plan and report are about model.hf_path, whatever a stage reads")
TIED_EMBEDDINGS = Rule(
    "tied-embeddings",
    "a config that disagrees with the weights on tying gives a model without a head",
    f"{_NEMO}#12497, #12545; {_BRIDGE}#1420",
)
VOCABULARY = Rule(
    "vocabulary",
    "tensor parallelism splits the vocabulary, and padding it leaks into export and loss",
    f"{_BRIDGE}#625, #1853; {_NEMO}#14870",
)
TOKENIZER = Rule(
    "tokenizer",
    "a loss on logits compares tokens by number: with two vocabularies it is noise",
    f"{_MODELOPT}#2489; pytorch/torchtune#2119",
)

# Data
DATA_SOURCES = Rule("data-sources", "text that cannot be read is found out after the import")
CHAT = Rule(
    "chat",
    "an answer is where the model's own template puts it, and whole, or others are learnt",
)
DOCUMENT_END = Rule("document-end", "a token that the tokenizer lacks fails after the import")
DATA_PARTS = Rule("data-parts", "every part of the text is needed, training included")
SEQ_LENGTH = Rule(
    "seq-length",
    "positions beyond the teacher's were never trained, and windows must fit the text",
)
TOKENS = Rule("tokens", "less text than a batch cannot be trained on")
EPOCHS = Rule(
    "epochs",
    "more tokens planned than there are repeats the text; past 4 epochs it teaches little",
    "arXiv:2305.16264",
    WARNING,
)

# Pruning
PRUNE_TARGET = Rule(
    "prune-target",
    "ModelOpt silently skips an axis whose target is not among its choices",
    f"{_MODELOPT}#2159",
)
LARGE_CUT = Rule(
    "large-cut",
    "up to a third of the parameters comes back well; more does in rounds, each distilled",
    f"{_MODELOPT}, examples/pruning/README.md; arXiv:2407.14679",
    WARNING,
)
SEARCHED_SHAPE = Rule(
    "searched-shape",
    "a search chooses while the chain runs, so plans before it are of a shape that stands for it",
    severity=WARNING,
)
LAYER_IMPORTANCE = Rule(
    "layer-importance", "layers can only be chosen by a score that was measured"
)
HEALING = Rule("healing", "weights are refitted on text, and experts see too little of it each")
CALIBRATION = Rule("calibration", "importance on padding or noise prunes at random")
BUDGET = Rule("budget", "a search needs a budget that some shape fits")
REPORT = Rule("report", "a report is about a whole distillation, a search, or both")
SEARCH = Rule("search", "a ranking or a halving needs candidates, windows and steps")
SLOW_SIZES = Rule(
    "slow-sizes",
    "a dimension that is no multiple of 16 on a rank runs on slow kernels, or not in FP8",
    severity=WARNING,
)
ONE_RANK = Rule(
    "one-rank",
    "the stage has work for one process",
    f"{_NEMO}#11531",
)

# Layout
RANKS = Rule("ranks", "TP x PP x CP must divide the ranks")
BATCH = Rule("batch", "a global batch is a whole number of micro batches on every replica")
TENSOR_PARALLEL = Rule(
    "tensor-parallel", "every rank holds the same share of heads, groups and columns"
)
PIPELINE_PARALLEL = Rule(
    "pipeline-parallel", "every stage holds at least one layer", f"{_BRIDGE}#1727"
)
SEQUENCE_PARALLEL = Rule("sequence-parallel", "every rank holds the same share of a window")
CONTEXT_PARALLEL = Rule(
    "context-parallel", "each rank holds two chunks of a window, and TransformerEngine"
)
EXPERT_PARALLEL = Rule("expert-parallel", "experts are split over the replicas", f"{_BRIDGE}#1727")
OPTIMIZER_INSTANCES = Rule(
    "optimizer-instances", "every copy of the optimizer's state is split over as many replicas"
)
RECOMPUTE = Rule(
    "recompute",
    "recomputed layers show the loss no hidden states; a part that is not there saves nothing",
)

# Training
FP8 = Rule(
    "fp8", "FP8 products need TransformerEngine, GPUs that have them, and sizes that they can take"
)
TP_COMM_OVERLAP = Rule(
    "tp-comm-overlap",
    "TransformerEngine's buffers are of one hidden size, and a teacher would share the student's",
    "NVIDIA/Megatron-LM#6018",
)
COMPILER = Rule(
    "compiler", "PyTorch makes a CPU's kernels with a C++ compiler and Python's headers"
)
CUDA_GRAPHS = Rule(
    "cuda-graphs",
    "a layer that is replayed recomputes nothing, asks the host nothing and shows no hidden states",
)
PROFILE = Rule("profile", "steps that a training does not have leave no trace")
SCHEDULE = Rule("schedule", "a learning rate that is never reached, or below its end, stops NeMo")
LOSS = Rule("loss", "terms and weights that do not make a loss")
STOP = Rule("stop", "a training can only stop by what its validations measure before its end")
HIDDEN_PAIRS = Rule(
    "hidden-pairs",
    "the loss is on the last pipeline stage, so the layers it compares must be there",
    f"{_NEMO}#13557",
)
CACHED_TEACHER = Rule(
    "cached-teacher", "a cache holds few tokens, of one temperature and window length"
)
TOP_K = Rule("top-k", "a cache of the whole vocabulary is no cache")
EVALUATE = Rule("evaluate", "a prompt as long as its window leaves nothing to continue")

# Engines and benchmarks
FORMAT = Rule("format", "weights are stored in one of the formats that a backend reads")
KV_CACHE = Rule(
    "kv-cache", "keys and values are stored in few types, and in engines by scales from calibration"
)
MAX_SEQ_LEN = Rule("max-seq-len", "an engine cannot serve positions that the model has not")
MAX_INPUT_LEN = Rule(
    "max-input-len", "a prompt as long as the engine's limit leaves no room for a token"
)
HEAD_SIZE = Rule("head-size", "attention kernels exist for few head sizes")
ALIGNMENT = Rule("alignment", "a kernel of that precision does not exist for other sizes")
LENGTH = Rule("length", "prompt and new tokens must fit the model's positions")
ENGINE_LIMITS = Rule("engine-limits", "an engine refuses more than it was built for")
TASKS_HARNESS = Rule(
    "tasks-harness", "benchmarks are lm-eval's, of the version whose items were checked"
)
TASKS_NAMES = Rule(
    "tasks-names", "a benchmark that is not known is found out after hours of training"
)
TASKS_FEWSHOT = Rule("tasks-fewshot", "examples for a task that is not done do nothing")
GATES = Rule("gates", "a gate that names nothing measured would stop the chain at its end")

RULES = {rule.name: rule for rule in list(vars().values()) if isinstance(rule, Rule)}
"""All of them, in the order above."""
