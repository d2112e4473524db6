"""From a composed config to a plan: typed stages in order, fingerprints, and what must run."""

from __future__ import annotations

import graphlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.hydra_errors import fix_of
from launch.machine import chain_of, cluster_problems, mpi_problems
from launch.planned import PlannedStage, load_stage, stage_of
from launch.rounds import in_rounds
from launch.settings import RunSettings
from launch.staleness import ADOPT, SKIP, require_nothing_lost, status
from recipes.core.constraints import violations
from recipes.core.errors import RecipeError, did_you_mean, require_known
from recipes.core.fingerprint import external_stamp
from recipes.core.manifest import check_artifact
from recipes.core.run_state import InputRef, request_of
from recipes.core.stage import StageConfig
from recipes.planning import rules
from recipes.planning.chain import Chain
from recipes.planning.inference_cost import InferenceCost
from recipes.planning.limits import limit_problems
from recipes.planning.problems import Problem, require_none
from recipes.planning.rules import ERROR
from recipes.planning.workload import Workload
from recipes.report.gates import Gate, known_names, parse, problems


@dataclass(frozen=True)
class Plan:
    """The whole run."""

    run_dir: Path
    chain: Chain
    stages: tuple[PlannedStage, ...]
    notes: tuple[Problem, ...] = ()
    """Warnings, and errors that were waived."""
    gates: tuple[Gate, ...] = ()

    def todo(self) -> list[PlannedStage]:
        """Stages that will be started, in order."""
        return [stage for stage in self.stages if stage.action not in (SKIP, ADOPT)]


def make_plan(cfg: DictConfig, settings: RunSettings, run_dir: Path) -> Plan:
    """Refuses whatever can be seen to fail without running, and decides what must run."""
    hf_path = settings.hf_path  # first: stages that have it as a field would say less
    configs = typed_stages(cfg)
    only = None if settings.only is None else known_stages(settings.only, configs, "only")
    force = known_stages(settings.force, configs, "force")
    order = stage_order(configs)
    configs = {name: configs[name] for name in order}
    chain = with_shapes(chain_of(cfg, hf_path, configs, run_dir), order)
    gates = _gates(settings, configs)
    wanted = [name for name in order if only is None or name in only]
    notes = require_none(checks(cfg, chain, wanted), settings.skip_rules)
    chain = replace(chain, workloads=workloads_of(chain), inference_costs=inference_costs_of(chain))
    if not any(note.rule.severity == ERROR for note in notes):  # skipped errors break estimates
        notes += require_none(_limit_problems(chain, wanted), settings.skip_rules)
    for name, config in configs.items():
        configs[name] = stage_of(config).resolve_from_chain(config, chain)
    needed = {*wanted, *(s for name in wanted for s in configs[name].inputs.values())}
    planned: dict[str, PlannedStage] = {}
    for name in order:
        stage = _plan_stage(name, configs[name], run_dir / name, planned, force, chain)
        if name in needed and stage.action == SKIP:
            check_artifact(stage.directory, rehash=False)  # its files were not edited since
        if name in wanted and name not in force:
            require_nothing_lost(stage)
        if name in needed and name not in wanted:
            _require_complete(stage)
        planned[name] = stage
    plan = Plan(run_dir, chain, tuple(planned[name] for name in wanted), notes, gates)
    return replace(plan, notes=notes + require_none(_disk_problems(plan), settings.skip_rules))


def checks(cfg: DictConfig, chain: Chain, wanted: list[str]) -> Iterator[Problem]:
    """Everything that is wrong with the stages that are wanted, and with where they run."""
    yield from cluster_problems(cfg.cluster, chain.hardware)
    yield from mpi_problems(cfg.cluster, chain, wanted)
    planning = any(stage_of(chain.stages[name]).plans_workloads for name in wanted)
    for name, config in chain.stages.items():
        stage = stage_of(config)
        if name in wanted or (planning and stage.workload):
            yield from stage.problems(config, chain)
        if (hf_path := vars(config).get("hf_path", chain.hf_path)) != chain.hf_path:
            yield Problem(
                rules.MODEL,
                f"stages.{name}.hf_path={hf_path} is not model.hf_path={chain.hf_path}",
                f"leave it out, or set model.hf_path={hf_path} for all stages",
            )


def _limit_problems(chain: Chain, wanted: list[str]) -> Iterator[Problem]:
    """Finds stages that need more than there is."""
    yield from limit_problems(chain, wanted)
    for name in wanted:
        config = chain.stages[name]
        yield from stage_of(config).memory_problems(name, config, chain)


def with_shapes(chain: Chain, order: Iterable[str]) -> Chain:
    """Returns the chain with the shapes of its stages' models; ``order`` has inputs first."""
    for name in order:
        config = chain.stages[name]
        shapes = stage_of(config).shapes(config, chain)
        chain = replace(chain, shapes={**chain.shapes, name: shapes})
    return chain


def workloads_of(chain: Chain) -> dict[str, Workload]:
    """Returns each training and each teacher's pass over a text, by stage."""
    return {
        name: workload(config, chain)
        for name, config in chain.stages.items()
        if (workload := stage_of(config).workload) is not None
    }


def inference_costs_of(chain: Chain) -> dict[str, InferenceCost]:
    """Returns the cost of each stage that runs models and trains none."""
    return {
        name: inference_cost(config, chain)
        for name, config in chain.stages.items()
        if (inference_cost := stage_of(config).inference_cost) is not None
    }


def typed_stages(cfg: DictConfig) -> dict[str, StageConfig]:
    """The stage nodes of a composed config as their dataclasses; refuses what does not fit them."""
    typed: dict[str, StageConfig] = {}
    wrong: list[str] = []
    for name, node in in_rounds(cfg).items():
        where = f"stages.{name}"
        if not issubclass(OmegaConf.get_type(node) or dict, StageConfig):
            raise RecipeError(f"{where}={node} is not a stage.", f"leave it out: '~{where}'")
        try:
            config: StageConfig = OmegaConf.to_object(node)  # type: ignore[assignment]
        except OmegaConfBaseException as error:
            said = str(error).splitlines()[0]
            raise RecipeError(f"{where}: {said}", fix_of(said)) from error
        load_stage(config.stage)
        wrong += violations(config, where)
        typed[name] = config
    if wrong:
        raise RecipeError("\n".join(wrong), fix="")
    if not typed:
        raise RecipeError(
            "the recipe has no stages.", "choose one that has, and leave out stages={}"
        )
    return typed


def _gates(settings: RunSettings, configs: Mapping[str, StageConfig]) -> tuple[Gate, ...]:
    """The recipe's gates, each on a figure that one of its stages measures."""
    gates = tuple(map(parse, settings.gates))
    kinds = {name: stage_of(config).kind for name, config in configs.items()}
    require_none(problems(gates, known_names(configs, kinds)))
    return gates


def known_stages(names: Iterable[str], configs: Mapping[str, StageConfig], where: str) -> set[str]:
    """The stages that a setting names; refuses those that are not in the recipe."""
    for name in names:
        require_known(name, configs, f"{where}: there is no stage '{name}'")
    return set(names)


def stage_order(configs: Mapping[str, StageConfig]) -> list[str]:
    """Stage names, inputs before what needs them; the graph is the inputs themselves."""
    graph: dict[str, set[str]] = {}
    for name, config in configs.items():
        for key, source in config.inputs.items():
            if source not in configs and not Path(source).is_dir():
                raise RecipeError(
                    f"stages.{name}.inputs.{key}={source} is neither a stage of this recipe nor a "
                    f"stage directory.{did_you_mean(source, configs)}",
                    f"use one of: {', '.join(configs)}, or a path such as runs/other/{key}",
                )
        graph[name] = {source for source in config.inputs.values() if source in configs}
    try:
        # Sorted within a rank, so that the order is the recipe's and not a set's.
        sorter = graphlib.TopologicalSorter(graph)
        sorter.prepare()
        order: list[str] = []
        while sorter.is_active():
            ready = sorted(sorter.get_ready(), key=list(configs).index)
            order += ready
            sorter.done(*ready)
        return order
    except graphlib.CycleError as error:
        raise RecipeError(
            f"stages feed each other in a circle: {' → '.join(error.args[1])}.",
            "give one of them another input: stages.NAME.inputs",
        ) from error


def _plan_stage(
    name: str,
    config: StageConfig,
    directory: Path,
    planned: Mapping[str, PlannedStage],
    force: set[str],
    chain: Chain,
) -> PlannedStage:
    spec = stage_of(config)
    request = request_of(
        name,
        config,
        _resolve_inputs(name, config, planned),
        starts=spec.starts,
        external={key: external_stamp(path) for key, path in spec.external(config).items()},
        in_image=bool(chain.image_of(config.stage)),
    )
    stage = PlannedStage(
        name=name,
        directory=directory,
        config=config,
        inputs=request.inputs,
        code=request.code,
        libraries=request.libraries,
        fingerprint=request.fingerprint,
        action=SKIP,
        reason="complete",
        chain=chain,
    )
    upstream = [planned[s] for s in config.inputs.values() if s in planned]
    rerun = [other.name for other in upstream if other.action != SKIP]
    action, reason = status(stage, rerun, forced=name in force)
    return replace(stage, action=action, reason=reason)


def _resolve_inputs(
    name: str, config: StageConfig, planned: Mapping[str, PlannedStage]
) -> dict[str, InputRef]:
    needed, optional = stage_of(config).inputs, stage_of(config).optional_inputs
    given = config.inputs.keys()
    if not needed.keys() <= given <= needed.keys() | optional.keys():
        also = f" and may have {', '.join(optional)}" if optional else ""
        raise RecipeError(
            f"stages.{name}.inputs has {', '.join(given) or 'nothing'}; "
            f"{config.stage} needs {', '.join(needed) or 'nothing'}{also}.",
            "name each input once",
        )
    inputs = {}
    for key, source in config.inputs.items():
        kinds = needed[key] if key in needed else optional[key]
        if (found := planned.get(source)) is not None:
            ref = InputRef(found.directory, found.stage.kind, found.fingerprint)
        else:
            directory = Path(source).resolve()
            manifest = check_artifact(directory, rehash=False)
            ref = InputRef(directory, manifest.kind, manifest.fingerprint)
        if ref.kind not in kinds:
            raise RecipeError(
                f"stages.{name}.inputs.{key}={source} is a {ref.kind}; "
                f"a {' or '.join(kinds)} is needed.",
                "point it at a stage of that kind",
            )
        inputs[key] = ref
    return inputs


def _require_complete(stage: PlannedStage) -> None:
    """Refuses a stage that ``only`` leaves out although a requested stage needs its result."""
    if stage.action != SKIP:
        raise RecipeError(
            f"only leaves out {stage.name}, whose result is needed but not there ({stage.reason}).",
            f"add {stage.name} to only, or run the whole chain",
        )


def _disk_problems(plan: Plan) -> Iterator[Problem]:
    """What would fill the disk: artifacts, and the checkpoints that a training keeps."""
    need = sum(s.stage.disk_bytes(s.config, plan.chain) for s in plan.todo())
    existing = next(p for p in (plan.run_dir, *plan.run_dir.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if need > free:
        yield Problem(
            rules.DISK,
            f"{plan.run_dir} needs about {need / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free.",
            "free some space, set run_dir to another disk, or lower keep_checkpoints",
        )
