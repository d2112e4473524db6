"""Plans a run: checks its composed config, orders its stages, and decides which must run."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from omegaconf import DictConfig

from launch.accept import accept_result, new_acceptances, require_confirmed
from launch.machine import chain_of, cluster_problems, mpi_problems
from launch.planned import (
    ADOPT,
    SKIP,
    PlannedStage,
    choose_action,
    replaced_results,
    require_no_lost_work,
    require_same_optimizers,
    stage_of,
    start_of,
)
from launch.settings import RunSettings
from launch.stages import known_stages, require_inputs, stage_order, typed_stages, with_shapes
from nemo_convert.licences import forbids_commercial_use
from recipes.core.errors import RecipeError
from recipes.core.files import folder_bytes
from recipes.core.fingerprint import external_stamp
from recipes.core.manifest import WORK, Acceptance, check_artifact
from recipes.core.run_state import InputRef, request_of
from recipes.core.stage import StageConfig
from recipes.core.versions import result_versions
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.limits import limit_problems
from recipes.planning.rules import Problem, refuse_errors
from recipes.report.gates import (
    SERVED_PERPLEXITY,
    Gate,
    Verdict,
    gate_problems,
    judge,
    metric_names,
    parse_gate,
)
from recipes.report.settings import ReportConfig
from recipes.report.upstream import inputs_from_other_runs, recorded_licences


@dataclass(frozen=True)
class Plan:
    """The plan of a run."""

    run_dir: Path
    chain: Chain
    """All stages of the recipe, and the hardware."""
    stages: tuple[PlannedStage, ...]
    """The selected stages, in order."""
    excluded: tuple[PlannedStage, ...] = ()
    """Stages of the recipe that ``only`` excludes."""
    notes: tuple[Problem, ...] = ()
    """Warnings, and errors of skipped rules."""
    gates: tuple[Gate, ...] = ()
    """The requirements on results that the setting ``gates`` lists."""
    acceptances: Mapping[Path, Acceptance | None] = field(default_factory=dict)
    """Acceptances of stale results to record, by stage directory; ``None`` removes one."""
    replaces: Mapping[str, str | None] = field(default_factory=dict)
    """Start times of the old results that ``force`` replaces; see ``LastPlan.replaces``."""

    def todo(self) -> list[PlannedStage]:
        """Returns the stages that will be started, in order."""
        return [stage for stage in self.stages if stage.action not in (SKIP, ADOPT)]

    def judge_gates(self) -> tuple[list[Verdict], list[Gate]]:
        """Judges the gates by the results of all stages, also of those that ``only`` excludes.

        Returns:
            The verdicts, and the gates that have none because a stage has no result yet.
        """
        stages = {stage.name: stage for stage in (*self.stages, *self.excluded)}
        # In the recipe's order, because ``judge`` takes a value from the last stage that has it.
        results = {name: stages[name].result for name in self.chain.stages}
        complete = {name: result for name, result in results.items() if result}
        incomplete = results.keys() - complete.keys()
        pending_metrics = metrics_of(stages[name].config for name in incomplete)
        to_judge = [gate for gate in self.gates if gate.name not in pending_metrics]
        verdicts = judge(to_judge, complete)
        judged = [verdict.gate for verdict in verdicts]
        return verdicts, [gate for gate in self.gates if gate not in judged]


def make_plan(cfg: DictConfig, settings: RunSettings, run_dir: Path) -> Plan:
    """Decides which stages must run. Refuses errors whose rules are not in ``skip_rules``."""
    hf_path = settings.hf_path  # refuses a missing model before stages give unclear errors
    configs = typed_stages(cfg)
    only = None if settings.only is None else known_stages(settings.only, configs, "only")
    force, accept = forced_and_accepted(settings, configs)
    order = stage_order(configs)
    configs = {name: configs[name] for name in order}
    chain = with_shapes(chain_of(cfg, hf_path, configs, run_dir), order)
    gates = planned_gates(settings, chain)
    selected = [name for name in order if only is None or name in only]
    notes = refuse_errors(_problems(cfg, chain, selected), settings.skip_rules)
    chain = _with_costs(chain)
    notes += refuse_errors(_limit_problems(chain, selected, notes), settings.skip_rules)
    configs = {n: stage_of(c).resolve_from_chain(c, chain) for n, c in configs.items()}
    chain = replace(chain, stages=configs)
    input_stages = {source for name in selected for source in configs[name].inputs.values()}
    needed = {*selected, *input_stages}
    planned: dict[str, PlannedStage] = {}
    # An interrupted command with ``force`` may have replaced some results already. Both dicts have
    # start times of old results, by stage.
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
        if name in needed and stage.action == SKIP:
            check_artifact(stage.directory, rehash=False)  # refuses edited files
        if name in selected:
            require_same_optimizers(stage)
            if name not in force:
                require_no_lost_work(stage, planned)
        if name in needed and name not in selected and stage.action != SKIP:
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


def _old_starts(stages: Iterable[PlannedStage]) -> dict[str, str | None]:
    """Returns the start times of the results that this plan replaces, by stage."""
    return {stage.name: start_of(stage.directory) for stage in stages if stage.action != SKIP}


def _problems(cfg: DictConfig, chain: Chain, selected: list[str]) -> Iterator[Problem]:
    """Checks the selected stages, and the cluster and hardware that they run on."""
    yield from cluster_problems(cfg.cluster, chain, selected)
    yield from mpi_problems(cfg.cluster, chain, selected)
    yield from _licence_problems(chain)
    # A stage of the kind ``plan`` also estimates unselected stages, so these must be valid.
    estimates_all = any(stage_of(chain.stages[name]).kind == "plan" for name in selected)
    for name, config in chain.stages.items():
        stage = stage_of(config)
        if name in selected or (estimates_all and stage.workload):
            yield from stage.problems(config, chain)
        if (hf_path := vars(config).get("hf_path", chain.hf_path)) != chain.hf_path:
            yield Problem(
                rules.MODEL,
                f"stages.{name}.hf_path={hf_path} is not model.hf_path={chain.hf_path}",
                f"leave it out, or set model.hf_path={hf_path} for all stages",
            )


def _licence_problems(chain: Chain) -> Iterator[Problem]:
    """Checks the licences of texts and models of other runs. Stages check those of this run."""
    inputs = inputs_from_other_runs(chain.stages)
    for licence in sorted(filter(forbids_commercial_use, recorded_licences(inputs))):
        yield Problem(
            rules.LICENCE,
            f"a text or model of {', '.join(inputs)} has the licence {licence}, which forbids "
            "commercial use",
            "use inputs with other text and another teacher for commercial use",
        )


def _limit_problems(
    chain: Chain, selected: list[str], skipped: Iterable[Problem]
) -> Iterator[Problem]:
    """Checks whether time and memory suffice for the selected stages.

    If the user skips an error of ``SIZE_RULES``, nothing can be estimated. Then yields a warning.
    """
    broken = ", ".join(sorted({p.rule.name for p in skipped if p.rule in rules.SIZE_RULES}))
    if broken:
        what = f"memory, time and text are not checked, because a problem of {broken} is skipped"
        fix = f"correct the settings, and leave {broken} out of skip_rules"
        yield Problem(rules.UNCHECKED_LIMITS, what, fix)
        return
    yield from limit_problems(chain, selected)
    for name in selected:
        config = chain.stages[name]
        yield from stage_of(config).memory_problems(name, config, chain)


def _with_costs(chain: Chain) -> Chain:
    """Adds workloads of stages that train or cache logits, and inference costs of other stages."""
    workloads, inference_costs = {}, {}
    for name, config in chain.stages.items():
        stage = stage_of(config)
        if stage.workload is not None:
            workloads[name] = stage.workload(config, chain)
        if (cost := stage.inference_cost(config, chain)) is not None:
            inference_costs[name] = cost
    return replace(chain, workloads=workloads, inference_costs=inference_costs)


def planned_gates(settings: RunSettings, chain: Chain) -> tuple[Gate, ...]:
    """Parses the recipe's gates; refuses gates on values that no stage measures.

    Also refuses a report with other gates, which would not be judged.
    """
    gates = tuple(map(parse_gate, settings.gates))
    names = metrics_of(chain.stages.values())
    for config in chain.stages.values():
        stage = stage_of(config)
        if stage.kind == "served_results" and stage.needs_tensorrt_llm(config, chain):
            names.remove(SERVED_PERPLEXITY)  # trtllm-serve returns no losses
    refuse_errors(gate_problems(gates, names))
    for config in chain.stages.values():
        if isinstance(config, ReportConfig) and config.gates != settings.gates:
            raise RecipeError(
                f"stages.{config.name}.gates={config.gates} is not gates={settings.gates}; only "
                "the latter is judged.",
                "set only gates=[…], which the report also shows",
            )
    return gates


def metrics_of(configs: Iterable[StageConfig]) -> list[str]:
    """Returns the names of all values that stages measure."""
    return metric_names((config, stage_of(config).kind) for config in configs)


def forced_and_accepted(
    settings: RunSettings, configs: Mapping[str, StageConfig]
) -> tuple[set[str], set[str]]:
    """Returns the stages that ``force`` lists, and those that ``accept`` lists; checks both."""
    force = known_stages(settings.force, configs, "force")
    accept = known_stages(settings.accept, configs, "accept")
    selected = configs if settings.only is None else settings.only
    if excluded := sorted(force.difference(selected)):
        raise RecipeError(
            f"force names {', '.join(excluded)}, but only=[…] excludes it.",
            f"add {excluded[0]} to only, or leave it out of force",
        )
    if conflicts := sorted(force & accept):
        raise RecipeError(
            f"force and accept both name {', '.join(conflicts)}.",
            "list each stage in only one of them",
        )
    return force, accept


def _plan_stage(
    directory: Path, config: StageConfig, planned: Mapping[str, PlannedStage], chain: Chain
) -> PlannedStage:
    """Plans a stage with a placeholder, ``SKIP``, as its action, which the caller replaces.

    ``planned`` has the earlier stages of the plan, by name.
    """
    # ``config.name`` may be wrong: ``resolve_from_chain`` may return a copy, which loses the name.
    name, definition = directory.name, stage_of(config)
    require_inputs(name, config, {n: stage.definition for n, stage in planned.items()})
    upstream = [planned[source] for source in config.inputs.values() if source in planned]
    kept = {stale: reasons for stage in upstream for stale, reasons in stage.kept.items()}
    request = request_of(
        name,
        config,
        {key: _input(source, planned) for key, source in config.inputs.items()},
        starts=definition.starts,  # stages that this stage starts; their code counts, too
        external={
            key: external_stamp(path, definition.external_files)
            for key, path in definition.external(config).items()
        },
        versions=result_versions(
            in_image=bool(definition.image(config, chain)),
            libraries=definition.libraries,
            programs=definition.programs,
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


def _input(source: str, planned: Mapping[str, PlannedStage]) -> InputRef:
    """Returns the input that ``source`` names: a stage of this plan, or another run's directory."""
    if (stage := planned.get(source)) is None:
        return InputRef.of(Path(source).resolve())
    return InputRef(stage.directory, stage.definition.kind, stage.fingerprint)


def _disk_problems(plan: Plan) -> Iterator[Problem]:
    """Checks whether the disk has space for artifacts and for checkpoints of training runs."""
    needed = 0
    for stage in plan.todo():
        # The stage resumes or deletes its unfinished work, whose space it then uses.
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
