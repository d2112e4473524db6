"""Describes a run's stages before the run starts, for each stage's ``check``. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemo_convert.architecture import Architecture
from nemo_convert.hf import imported_tokenizer_sha256
from nemo_convert.hf_config import read_architecture
from nemo_convert.hub import hub_arguments, is_config_available, is_hub_id, read_hf_config
from nemo_convert.preflight import tokenizer_folder
from nemo_convert.tokenizer_conversion import needs_conversion
from recipes.core.files import read_json
from recipes.core.manifest import manifest_of
from recipes.core.stage import StageConfig
from recipes.data.settings import PrepareDataConfig
from recipes.planning import rules
from recipes.planning.hardware import Hardware
from recipes.planning.inference_cost import InferenceCost
from recipes.planning.rules import Problem
from recipes.planning.workload import Workload

CONFIGS: dict[str, dict[str, Any]] = read_json(Path(__file__).with_name("published_configs.json"))
"""Configs of the shipped recipes' teachers, by hub id. They are used if the hub cannot be reached.

Each config has those fields of the teacher's ``config.json`` that a plan needs.
"""
TENSORRT_LLM = "tensorrt_llm"
"""Key of ``Chain.images``: the container image of stages that run TensorRT-LLM."""
LONG_DATA = "prepare_long_data"
"""Name of the stage that the option ``long_context`` adds. It has its own ``seq_length``."""
TOKENIZER_INPUTS = ("tokenizer", "checkpoint", "student", "teacher")
"""Names of inputs that can provide a stage's tokenizer, in order of precedence."""


@dataclass(frozen=True)
class Chain:
    """What is known of a run before it starts: settings, machines, shapes and estimated costs."""

    hf_path: str
    """Hub id or folder of the teacher."""
    teacher: Architecture
    """Shape of the teacher."""
    stages: Mapping[str, StageConfig]
    """Settings of the stages, by name."""
    hardware: Hardware = field(default_factory=Hardware)
    run_dir: Path | None = None
    """Directory with the results of an earlier run of this chain."""
    runs_here: bool = False
    """Whether the stages run on this machine and outside of containers."""
    own_python: bool = True
    """Whether the stages run with the launcher's Python, on this machine or on Slurm's nodes."""
    images: Mapping[str, str | None] = field(default_factory=dict)
    """Names of container images. A key is a stage's module, ``tensorrt_llm``, or ``default``."""
    time_limit: str = ""
    """Time limit of a Slurm job, in Slurm's format; empty if there is no limit."""
    margin_seconds: int | None = None
    """How many seconds before the time limit a stage stops; ``None`` for an estimate by stage."""
    max_requeues: int | None = None
    """How often a job that reached its time limit is started again; ``None`` for no maximum."""
    from_published_config: bool = False
    """Whether the teacher's shape comes from ``CONFIGS``, because config.json cannot be read."""
    shapes: Mapping[str, Sequence[Architecture]] = field(default_factory=dict)
    """For each stage, the shapes that its model may have, the largest first. Empty for a search
    that must measure latency first."""
    workloads: Mapping[str, Workload] = field(default_factory=dict)
    """Work of the stages that train, or that cache a teacher's logits, by stage. Empty until all
    checks have passed."""
    inference_costs: Mapping[str, InferenceCost] = field(default_factory=dict)
    """Costs of the other stages that run models, by stage. Empty until all checks have passed."""

    def image_of(self, module: str, tensorrt_llm: bool) -> str | None:
        """Returns the image that a stage runs in; ``None`` outside of containers.

        An image for the stage's module has precedence over ``tensorrt_llm`` and ``default``.
        """
        names = (module, TENSORRT_LLM if tensorrt_llm else "default")
        return next((self.images[name] for name in names if name in self.images), None)

    def shape_of(self, stage: str | None) -> Architecture:
        """Returns the largest shape that a stage's model may have.

        ``stage`` may also be the directory of a stage of another run. Returns the teacher's shape
        if ``stage`` is ``None`` or the shape of its model is not known.
        """
        if stage is None:
            return self.teacher
        if stage in self.stages:  # the first of its shapes is the largest
            return next(iter(self.shapes.get(stage, ())), self.teacher)
        manifest = manifest_of(stage)
        if manifest is None or manifest.architecture is None:
            return self.teacher
        return Architecture(**manifest.architecture)

    def shapes_of(self, stage: str | None) -> Sequence[Architecture]:
        """Returns all shapes that a stage's model may have, the largest first; at least one."""
        return self.shapes.get(stage or "") or (self.shape_of(stage),)


def sequence_problems(
    seq_length: int, inputs: Mapping[str, str], chain: Chain
) -> Iterator[Problem]:
    """Checks a stage's ``seq_length`` against the teacher and against data with conversations.

    ``inputs`` are the stage's inputs: for each name, a stage of the run or a directory.
    """
    limit = chain.teacher.max_position_embeddings
    if not 1 <= seq_length <= limit:
        fix = f"set data.seq_length to at most {limit}"
        long_data = chain.stages.get(LONG_DATA)
        if long_data is not None and vars(long_data)["seq_length"] == seq_length:
            fix = "leave long_context out"
        yield Problem(
            rules.SEQ_LENGTH,
            f"seq_length={seq_length} is not between 1 and the teacher's {limit} positions",
            fix,
        )
    for name in inputs.values():
        config = chain.stages.get(name)
        if not (isinstance(config, PrepareDataConfig) and config.chat_sources()):
            continue  # other data can be read with any ``seq_length``
        if config.seq_length != seq_length:
            yield Problem(
                rules.CHAT,
                f"seq_length={seq_length}, but {name} packs whole conversations into sequences of "
                f"{config.seq_length} tokens",
                "set data.seq_length, which applies to all stages",
            )


def read_chain(hf_path: str, stages: Mapping[str, StageConfig]) -> Chain:
    """Returns a chain of ``stages`` with the shape in the teacher's ``config.json``."""
    config, is_published = read_config_or_published(hf_path)
    shape = read_architecture(config, hf_path)
    return Chain(hf_path, shape, stages, from_published_config=is_published)


def read_config_or_published(hf_path: str) -> tuple[dict[str, Any], bool]:
    """Reads a model's ``config.json``, or its copy in ``CONFIGS`` if the hub cannot be reached.

    Returns the config, and whether it is from ``CONFIGS``.
    """
    published = CONFIGS.get(str(hub_arguments(hf_path)["repo_id"])) if is_hub_id(hf_path) else None
    if published is not None and not is_config_available(hf_path):
        return published, True
    return read_hf_config(hf_path), False


def tokenizer_problems(cfg: StageConfig, chain: Chain) -> Iterator[Problem]:
    """Checks that a stage's inputs have the same tokenizer and vocabularies of the same size.

    A plan cannot know all tokenizers. It skips tokenizers in wheels, tokenizers whose files it
    cannot read, and tokenizers that ``import_hf`` converts in another Python. The stage compares
    all tokenizers when it starts.
    """
    # The stage or directory of the tokenizer of each input, by the input's name.
    sources = {name: tokenizer_source(source, chain) for name, source in cfg.inputs.items()}
    distinct_sources = set(sources.values())
    hashes: dict[str, str] = {}  # by input, without unknown hashes
    if len(distinct_sources) > 1:  # one source needs no hash, and hashes take time
        hash_by_source = {source: tokenizer_hash(source, chain) for source in distinct_sources}
        hashes = {name: sha for name, source in sources.items() if (sha := hash_by_source[source])}
    if len(set(hashes.values())) > 1:
        listing = ", ".join(f"{name} {sha[:12]}" for name, sha in hashes.items())
        yield Problem(
            rules.TOKENIZER,
            f"the inputs of {cfg.name} have different tokenizers: {listing}",
            "use models with the same tokenizer, and data that was tokenized with it",
        )
    sizes = {
        name: chain.shape_of(cfg.inputs[name]).vocab_size
        for name in ("teacher", "student")
        if name in cfg.inputs
    }
    if len(set(sizes.values())) > 1:
        listing = ", ".join(f"{name} {size}" for name, size in sizes.items())
        yield Problem(
            rules.VOCABULARY,
            f"the inputs of {cfg.name} have vocabularies of different sizes: {listing}",
            "resize the embeddings of one model to the size of the other "
            "(resize_token_embeddings), even if they differ only in padding",
        )


def tokenizer_source(source: str, chain: Chain) -> str:
    """Returns the stage, or directory of another run, from which ``source`` has its tokenizer."""
    config = chain.stages.get(source)
    inputs = config.inputs if config else {}
    upstream = next((inputs[name] for name in TOKENIZER_INPUTS if name in inputs), None)
    return source if upstream is None else tokenizer_source(upstream, chain)


def tokenizer_hash(source: str, chain: Chain) -> str | None:
    """Returns the SHA-256 of the tokenizer of a ``tokenizer_source``; ``None`` if unknown."""
    config = chain.stages.get(source)
    if config is None:
        manifest = manifest_of(source)
        return manifest.tokenizer_sha256 if manifest else None
    if "hf_path" not in vars(config):  # the stage does not read the tokenizer of a HF model
        return None
    folder = tokenizer_folder(vars(config)["hf_path"])
    if folder is None or not folder.is_dir():
        return None
    # If stages run in another Python, the libraries there may convert a tokenizer differently.
    can_convert = chain.own_python and find_spec("transformers") is not None
    is_known = can_convert or not needs_conversion(folder)
    return imported_tokenizer_sha256(folder) if is_known else None
