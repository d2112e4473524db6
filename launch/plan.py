"""Plans a run: checks its composed config, orders its stages, and decides which must run."""

from __future__ import annotations

import graphlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.accept import accept_result, new_acceptances, require_confirmed
from launch.hydra_errors import fix_of, refuse_unknown_fields
from launch.machine import chain_of, cluster_problems, mpi_problems
from launch.planned import (
    ADOPT,
    SKIP,
    PlannedStage,
    choose_action,
    load_stage,
    replaced_results,
    require_no_lost_work,
    stage_of,
    start_of,
)
from launch.schema import choices_with
from launch.settings import RunSettings
from nemo_convert.licences import forbids_commercial_use
from recipes.core.constraints import violations
from recipes.core.errors import RecipeError, did_you_mean, require_known
from recipes.core.files import folder_bytes
from recipes.core.fingerprint import external_stamp
from recipes.core.manifest import WORK, Acceptance, check_artifact
from recipes.core.run_state import InputRef, request_of
from recipes.core.stage import StageConfig
from recipes.core.versions import result_versions
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.limits import limit_problems
from recipes.planning.rules import ERROR, Problem, refuse_errors
from recipes.report.gates import (
    SERVED_PERPLEXITY,
    Gate,
    Verdict,
    gate_problems,
    judge,
    metric_names,
    parse_gate,
)
from recipes.report.upstream import inputs_from_other_runs, recorded_licences


@dataclass(frozen=True)
class Plan:
    """The planned stages of a run, in order."""

    run_dir: Path
    chain: Chain
    stages: tuple[PlannedStage, ...]
    excluded: tuple[PlannedStage, ...] = ()
    """Stages of the recipe that ``only`` excludes."""
    notes: tuple[Problem, ...] = ()
    """Warnings, and errors of skipped rules."""
    gates: tuple[Gate, ...] = ()
    """The requirements on results that the setting ``gates`` lists."""
    acceptances: Mapping[Path, Acceptance | None] = field(default_factory=dict)
    """Acceptances of stale results to record, by stage directory; ``None`` removes one."""
    replaces: Mapping[str, str | None] = field(default_factory=dict)
    """Start times of the results that ``force`` replaces, by stage; see ``LastPlan.replaces``."""

    def todo(self) -> list[PlannedStage]:
        """Returns the stages that will be started, in order."""
        return [stage for stage in self.stages if stage.action not in (SKIP, ADOPT)]

    def judge_gates(self) -> tuple[list[Verdict], list[Gate]]:
        """Judges the gates by the results of all stages, also of those that ``only`` excludes.

        If several stages measure the same value, the last one counts. It has the final model.

        Returns:
            The verdicts, and the gates that have none because a stage has no result yet.
        """
        stages = {stage.name: stage for stage in (*self.stages, *self.excluded)}
        results = {name: stages[name].result for name in self.chain.stages}
        complete = {name: result for name, result in results.items() if result}
        missing = metrics_of(stages[name].config for name in results.keys() - complete.keys())
        measured = [gate for gate in self.gates if gate.name not in missing]
        verdicts = judge(measured, complete)
        judged = [verdict.gate for verdict in verdicts]
        return verdicts, [gate for gate in self.gates if gate not in judged]


def make_plan(cfg: DictConfig, settings: RunSettings, run_dir: Path) -> Plan:
    """Decides which stages must run. Refuses errors whose rules are not in ``skip_rules``."""
    hf_path = settings.hf_path  # first, because its error is clearer than those of stages
    configs = typed_stages(cfg)
    only = None if settings.only is None else known_stages(settings.only, configs, "only")
    force, accept = _forced_and_accepted(settings, configs)
    order = stage_order(configs)
    configs = {name: configs[name] for name in order}
    chain = with_shapes(chain_of(cfg, hf_path, configs, run_dir), order)
    gates = _gates(settings, chain)
    selected = [name for name in order if only is None or name in only]
    notes = refuse_errors(_problems(cfg, chain, selected), settings.skip_rules)
    chain = _with_costs(chain)
    if not any(note.rule.severity == ERROR for note in notes):  # estimates need valid settings
        notes += refuse_errors(_limit_problems(chain, selected), settings.skip_rules)
    # All stages are resolved from the configured settings before ``|=`` updates the dict
    # ``configs``, which is also ``chain.stages``.
    configs |= {n: stage_of(c).resolve_from_chain(c, chain) for n, c in configs.items()}
    input_stages = {source for name in selected for source in configs[name].inputs.values()}
    needed_stages = {*selected, *input_stages}
    planned: dict[str, PlannedStage] = {}
    # An interrupted command with ``force`` may have replaced some results already.
    replaced, unfinished = replaced_results(run_dir) if force else ({}, {})
    for name in order:
        stage = _plan_stage(run_dir / name, configs[name], planned, chain)
        is_replaced = name in force and name in replaced and stage.result is not None
        forced = name in force and not is_replaced
        action, reason = choose_action(stage, forced=forced, selected=name in selected)
        if is_replaced and action == SKIP:
            reason = "already replaced by force"
        stage = replace(stage, action=action, reason=reason)
        if name not in force:
            stage = accept_result(stage, named=name in accept)
        if name in needed_stages and stage.action == SKIP:
            check_artifact(stage.directory, rehash=False)  # refuses edited files
        if name in selected and name not in force:
            require_no_lost_work(stage, planned)
        if name in needed_stages and name not in selected and stage.action != SKIP:
            raise RecipeError(
                f"only=[…] excludes {name}, but its result is needed, and missing or stale "
                f"({stage.reason}).",
                f"add {name} to only, run the whole chain, or keep a stale result: accept=[{name}]",
            )
        planned[name] = stage
    stages = tuple(planned[name] for name in selected)
    excluded = tuple(planned[name] for name in order if name not in selected)
    require_confirmed(stages, force, settings.confirm_above)
    acceptances = new_acceptances(planned.values())
    still_unfinished = {s.name: unfinished[s.name] for s in excluded if s.name in unfinished}
    replaces = {**replaced, **still_unfinished, **_old_starts(stages)} if force else {}
    plan = Plan(run_dir, chain, stages, excluded, notes, gates, acceptances, replaces)
    return replace(plan, notes=notes + refuse_errors(_disk_problems(plan), settings.skip_rules))


def _problems(cfg: DictConfig, chain: Chain, selected: list[str]) -> Iterator[Problem]:
    """Checks the selected stages, and the cluster and hardware that they run on."""
    yield from cluster_problems(cfg.cluster, chain, selected)
    yield from mpi_problems(cfg.cluster, chain, selected)
    yield from _licence_problems(chain)
    # The stage ``plan`` also estimates unselected stages, so their settings must be valid.
    has_plan_stage = any(stage_of(chain.stages[name]).kind == "plan" for name in selected)
    for name, config in chain.stages.items():
        stage = stage_of(config)
        if name in selected or (has_plan_stage and stage.workload):
            yield from stage.problems(config, chain)
        if (hf_path := vars(config).get("hf_path", chain.hf_path)) != chain.hf_path:
            yield Problem(
                rules.MODEL,
                f"stages.{name}.hf_path={hf_path} is not model.hf_path={chain.hf_path}",
                f"leave it out, or set model.hf_path={hf_path} for all stages",
            )


def _licence_problems(chain: Chain) -> Iterator[Problem]:
    """Checks the licences of texts and models of other runs; each stage checks its own settings."""
    inputs = inputs_from_other_runs(chain.stages)
    for licence in sorted(filter(forbids_commercial_use, recorded_licences(inputs))):
        yield Problem(
            rules.LICENCE,
            f"a text or model of {', '.join(inputs)} has the licence {licence}, which forbids "
            "commercial use",
            "use inputs with other text and another teacher for commercial use",
        )


def _limit_problems(chain: Chain, selected: list[str]) -> Iterator[Problem]:
    """Checks whether time and memory suffice for the selected stages."""
    yield from limit_problems(chain, selected)
    for name in selected:
        config = chain.stages[name]
        yield from stage_of(config).memory_problems(name, config, chain)


def with_shapes(chain: Chain, order: Iterable[str]) -> Chain:
    """Adds the shapes that each stage may produce. ``order`` lists each stage after its inputs."""
    for name in order:
        config = chain.stages[name]
        shapes = stage_of(config).shapes(config, chain)
        chain = replace(chain, shapes={**chain.shapes, name: shapes})
    return chain


def _with_costs(chain: Chain) -> Chain:
    """Adds workloads of stages that train or cache logits, and inference costs of other stages."""
    stages = {name: (config, stage_of(config)) for name, config in chain.stages.items()}
    return replace(
        chain,
        workloads={
            name: stage.workload(config, chain)
            for name, (config, stage) in stages.items()
            if stage.workload is not None
        },
        inference_costs={
            name: stage.inference_cost(config, chain)
            for name, (config, stage) in stages.items()
            if stage.inference_cost is not None
        },
    )


def typed_stages(cfg: DictConfig) -> dict[str, StageConfig]:
    """Converts the stages of a composed config to their dataclasses; refuses invalid settings."""
    typed: dict[str, StageConfig] = {}
    invalid: list[str] = []
    for name, node in cfg.stages.items():
        where = f"stages.{name}"
        if not issubclass(OmegaConf.get_type(node) or dict, StageConfig):
            raise RecipeError(f"{where}={node} is not a stage.", f"leave it out: '~{where}'")
        refuse_unknown_fields(node, where)
        try:
            config: StageConfig = OmegaConf.to_object(node)  # type: ignore[assignment]
        except OmegaConfBaseException as error:
            message = str(error).splitlines()[0]
            raise RecipeError(f"{where}: {message}", fix_of(message)) from error
        load_stage(config.stage)
        config.name = str(name)
        invalid += violations(config, where)
        typed[name] = config
    if invalid:
        raise RecipeError("\n".join(invalid), fix="")
    if not typed:
        raise RecipeError(
            "the recipe has no stages.", "choose a recipe that has some, and do not set stages={}"
        )
    return typed


def _gates(settings: RunSettings, chain: Chain) -> tuple[Gate, ...]:
    """Parses the recipe's gates; refuses gates on values that no stage measures."""
    gates = tuple(map(parse_gate, settings.gates))
    names = metrics_of(chain.stages.values())
    for config in chain.stages.values():
        stage = stage_of(config)
        if stage.kind == "served_results" and stage.needs_tensorrt_llm(config, chain):
            names.remove(SERVED_PERPLEXITY)  # trtllm-serve returns no losses
    refuse_errors(gate_problems(gates, names))
    return gates


def metrics_of(configs: Iterable[StageConfig]) -> list[str]:
    """Returns the names of all values that stages measure."""
    return metric_names((config, stage_of(config).kind) for config in configs)


def known_stages(names: Iterable[str], configs: Mapping[str, StageConfig], where: str) -> set[str]:
    """Returns the stages that a setting names; refuses names that are not in the recipe."""
    for name in names:
        require_known(name, configs, f"{where}: there is no stage '{name}'")
    return set(names)


def _old_starts(stages: Iterable[PlannedStage]) -> dict[str, str | None]:
    """Returns the start time of the old result of each stage to run; ``None`` without a result."""
    return {stage.name: start_of(stage.directory) for stage in stages if stage.action != SKIP}


def _forced_and_accepted(
    settings: RunSettings, configs: Mapping[str, StageConfig]
) -> tuple[set[str], set[str]]:
    """Returns the stages that ``force`` lists, and those that ``accept`` lists."""
    force = known_stages(settings.force, configs, "force")
    accept = known_stages(settings.accept, configs, "accept")
    if conflicts := sorted(force & accept):
        raise RecipeError(
            f"force and accept both name {', '.join(conflicts)}.",
            "list each stage in only one of them",
        )
    return force, accept


def stage_order(configs: Mapping[str, StageConfig]) -> list[str]:
    """Returns the stage names, each after its inputs; refuses unknown inputs and cycles."""
    graph: dict[str, set[str]] = {}
    for name, config in configs.items():
        for key, source in config.inputs.items():
            if source not in configs and not Path(source).is_dir():
                fix = f"use one of: {', '.join(configs)}, or a stage directory (runs/other/distill)"
                missing_choices = choices_with(source)  # group choices that would add the stage
                raise RecipeError(
                    f"stages.{name}.inputs.{key}={source} is neither a stage of this recipe nor a "
                    "stage directory."
                    f"{'' if missing_choices else did_you_mean(source, configs)}",
                    f"set {' or '.join(missing_choices)}" if missing_choices else fix,
                )
        graph[name] = {source for source in config.inputs.values() if source in configs}
    try:
        graphlib.TopologicalSorter(graph).prepare()  # finds cycles; its order is not used
    except graphlib.CycleError as error:
        raise RecipeError(
            f"stages feed each other in a circle: {' → '.join(error.args[1])}.",
            "give one of them another input: stages.NAME.inputs",
        ) from error
    # Each iteration adds all stages whose inputs are already in ``order``, in the config's order.
    order: list[str] = []
    while len(order) < len(graph):
        order += [name for name in graph if name not in order and graph[name] <= set(order)]
    return order


def _plan_stage(
    directory: Path, config: StageConfig, planned: Mapping[str, PlannedStage], chain: Chain
) -> PlannedStage:
    """Plans a stage with the placeholder action ``SKIP``, which the caller replaces."""
    name, definition = directory.name, stage_of(config)
    upstream = [planned[source] for source in config.inputs.values() if source in planned]
    kept = {key: why for stage in upstream for key, why in stage.kept.items()}
    request = request_of(
        name,
        config,
        _resolve_inputs(name, config, planned),
        starts=definition.starts,
        external={
            key: external_stamp(path, definition.external_files)
            for key, path in definition.external(config).items()
        },
        versions=result_versions(
            bool(definition.image(config, chain)), definition.libraries, definition.programs
        ),
    )
    return PlannedStage(
        name=name,
        directory=directory,
        config=config,
        inputs=request.inputs,
        code=request.code,
        libraries=request.libraries,
        fingerprint=request.fingerprint,
        action=SKIP,
        reason="complete",
        rerun_inputs=tuple(stage.name for stage in upstream if stage.action != SKIP),
        kept=kept,
        chain=chain,
    )


def _resolve_inputs(
    name: str, config: StageConfig, planned: Mapping[str, PlannedStage]
) -> dict[str, InputRef]:
    """Returns a stage's inputs, from this plan or other runs; refuses missing and wrong inputs."""
    required, optional = stage_of(config).inputs, stage_of(config).optional_inputs
    names = config.inputs.keys()
    # All required inputs must be set, and no input that is neither required nor optional.
    if not required.keys() <= names <= required.keys() | optional.keys():
        optional_text = f" and may have {', '.join(optional)}" if optional else ""
        raise RecipeError(
            f"stages.{name}.inputs has {', '.join(names) or 'nothing'}; "
            f"{config.stage} needs {', '.join(required) or 'nothing'}{optional_text}.",
            f"set all inputs that {config.stage} needs, and no unknown inputs",
        )
    inputs = {}
    for key, source in config.inputs.items():
        kinds = required[key] if key in required else optional[key]
        if (stage := planned.get(source)) is not None:
            ref = InputRef(stage.directory, stage.definition.kind, stage.fingerprint)
        else:
            directory = Path(source).resolve()
            manifest = check_artifact(directory, rehash=False)
            ref = InputRef(directory, manifest.kind, manifest.fingerprint)
        if ref.kind not in kinds:
            raise RecipeError(
                f"stages.{name}.inputs.{key}={source} is a {ref.kind}; "
                f"a {' or '.join(kinds)} is needed.",
                f"set it to a stage whose artifact is a {' or '.join(kinds)}",
            )
        inputs[key] = ref
    return inputs


def _disk_problems(plan: Plan) -> Iterator[Problem]:
    """Checks whether the disk has space for artifacts and for checkpoints of training runs."""
    needed = 0
    for stage in plan.todo():
        # The stage resumes its unfinished work or deletes it, so the work's space is reused.
        existing = folder_bytes(stage.directory / WORK)
        needed += max(0, stage.definition.disk_bytes(stage.config, plan.chain) - existing)
    # The run directory may not exist yet; its nearest existing parent is on the same disk.
    existing_dir = next(p for p in (plan.run_dir, *plan.run_dir.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing_dir).free
    if needed > free:
        yield Problem(
            rules.DISK,
            f"{plan.run_dir} needs about {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free.",
            "free some space, set run_dir to another disk, or lower keep_checkpoints or the text's "
            "max_tokens",
        )
