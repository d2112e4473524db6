"""Runs the commands of docs/first_day_on_slurm.md in order; jobs run ``probe.py``.

Here a rehearsal only lists its ranks; tests in ``tests/cpu/rehearsal`` run rehearsals. The fixture
``launcher_python`` runs ``./install.sh launcher``. No test runs the commands for docker, enroot and
GPUs.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from recipes.core.files import REPO_ROOT
from tests.slurm import probe
from tests.slurm.cluster import wait_for
from tests.slurm.conftest import Run
from tests.slurm.test_cluster_recipes import (
    one_rank,
    records,
    require_resources,
    whole_nodes,
)
from tests.support.contributing import copy_with
from tests.support.contributing import run as run_copy
from tests.support.in_process import run_in_process, run_successfully

PAGE = (REPO_ROOT / "docs" / "first_day_on_slurm.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
"""The page's seven commands in order: the plan, a rehearsal, two dry runs, and three commands of a
short run."""
RUN = "runs/first"
"""Run directory of the short run."""


def arguments_of(command: str) -> list[str]:
    """Returns the launcher's arguments in a command of the page."""
    python, program, *arguments = shlex.split(command)
    assert (python, program) == ("python", "launch/run.py")
    return arguments


def wait_until_complete(run_dir: Path) -> Run:
    """Waits for the jobs of a run; all of its stages must then be complete. Returns the run."""
    chain = Run(run_dir, ())
    chain.wait()
    assert set(chain.states().values()) == {"complete"}
    return chain


def test_plans_of_both_recipes_and_start_on_one_node(
    probe_settings: tuple[str, ...], tmp_path: Path
) -> None:
    plan, rehearse, one_node, all_nodes = map(arguments_of, COMMANDS[:4])
    assert "device-hours of training on h100" in run_successfully(*plan, cwd=tmp_path).output
    # The page also names one rehearsal of certain ranks, `'rehearse=[0,767]'`.
    rehearse_ranks = re.findall(r"`'(rehearse=\[.+?\])'`", PAGE)[0]
    recipe = rehearse[0]
    for overrides in (rehearse, [recipe, rehearse_ranks]):
        output = run_successfully(*overrides, "dry_run=true", cwd=tmp_path).output
        assert "would rehearse distill, rank 767 of 768" in output

    # The page's commands already have the first two settings.
    assert set(probe_settings[:2]) <= set(one_node)
    settings = probe_settings[2:]
    # Items 1 and 3 of the page's numbered list. Item 4, the run on all nodes, is only planned here.
    # ``test_ranks_get_the_planned_resources[qwen3_8b_depth]`` runs it.
    [only] = re.findall(r"^1\. A with `'(.+)'`", PAGE, re.MULTILINE)
    [few_steps] = re.findall(r"Start with `'(.+)'`", PAGE)
    for dry_run in (one_node, all_nodes, [*all_nodes, few_steps]):
        output = run_successfully(*dry_run, *settings, cwd=tmp_path).output
        assert re.search(r"distill +\d{4}-\d\d-\d\dT", output), "Slurm says when it could start"
    one_node.remove("dry_run=true")
    run_successfully(*one_node, only, *settings, cwd=tmp_path)
    run_dir = tmp_path / "runs" / one_node[0].removeprefix("recipe=")
    Run(run_dir, ()).wait()
    # The result that ``probe.py`` gives ``prepare_data`` has too few tokens for the plan.
    run_successfully(*one_node, few_steps, *settings, "skip_rules=[tokens]", cwd=tmp_path)
    chain = wait_until_complete(run_dir)
    require_resources(chain.directory / "distill", whole_nodes(1))


def write_cluster(checkout: Path, settings: Sequence[str]) -> str:
    """Writes overrides of ``cluster`` to ``conf/cluster/site.yaml``; returns the name "site"."""
    cluster = OmegaConf.from_dotlist(
        [setting for setting in settings if setting.startswith("cluster.")]
    ).cluster
    text = "defaults: [slurm, _self_]\n" + OmegaConf.to_yaml(cluster)
    (checkout / "conf" / "cluster" / "site.yaml").write_text(text)
    return "site"


def test_short_version_of_a_run(probe_settings: tuple[str, ...], tmp_path: Path) -> None:
    """For the first command, the settings of the cluster are in a file, as the page recommends.

    Distillation in the second command reports step 100 and waits, so that ``cancel`` stops it.
    """
    first, second, third = map(arguments_of, COMMANDS[4:])
    copy_with(tmp_path)
    name = write_cluster(tmp_path, probe_settings)
    other_overrides = [override for override in first if override not in probe_settings]
    process = run_copy(
        tmp_path, "launch/run.py", f"cluster={name}", *other_overrides, "skip_rules=[disk]"
    )
    assert process.returncode == 0, process.stdout + process.stderr
    chain = wait_until_complete(tmp_path / RUN)

    settings = probe_settings[2:]  # the second and third command already have the first two
    run_successfully(*second, f"+cluster.env.{probe.HOLD}='100'", *settings, cwd=tmp_path)
    assert f"status run_dir={RUN}`" in PAGE

    def status() -> str:
        return run_in_process("status", f"run_dir={RUN}", cwd=tmp_path).output

    wait_for(lambda: re.search("distill +running.* 100/200", status()), 60, pause=1)
    assert f"cancel run_dir={RUN}`" in PAGE
    run_successfully("cancel", f"run_dir={RUN}", cwd=tmp_path)
    chain.wait()

    output = run_successfully(*third, *settings, cwd=tmp_path).output
    assert re.search(r"distill +resume +was interrupted", output), output
    wait_until_complete(tmp_path / RUN)
    require_resources(chain.directory / "distill", whole_nodes(1, ranks=4))
    require_resources(chain.directory / "export_hf", one_rank("export_hf"))
    assert records(chain.directory / "distill")[0]["SLURM_JOB_NAME"].startswith("first.distill.")
