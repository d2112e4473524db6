"""Runs the commands of docs/first_day_on_slurm.md in order; jobs run ``probe.py``.

Other tests run the command of the rehearsal. Items 3 and 4 of the list are only dry runs. Commands
for docker, enroot and GPUs are not run.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from recipes.core.files import REPO_ROOT
from tests.slurm import probe
from tests.slurm.cluster import wait_for
from tests.slurm.conftest import Run
from tests.slurm.test_cluster_recipes import one_rank, records, require, states, whole_nodes
from tests.support.in_process import run_in_process, run_successfully

PAGE = (REPO_ROOT / "docs" / "first_day_on_slurm.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
RUN = "runs/first"


def arguments_of(command: str) -> list[str]:
    python, program, *arguments = shlex.split(command)
    assert (python, program) == ("python", "launch/run.py")
    return arguments


def test_commands_of_the_first_day(probe_settings: tuple[str, ...], tmp_path: Path) -> None:
    plan, rehearse, one_node, all_nodes, first, second, third = map(arguments_of, COMMANDS)
    assert rehearse == ["recipe=qwen3_8b_depth", "rehearse=true"]
    assert "device-hours of training on h100" in run_successfully(*plan, cwd=tmp_path).output
    settings = probe_settings[2:]  # the page's commands have the first two themselves
    assert set(probe_settings[:2]) <= set(one_node)
    [few_steps] = re.findall(r"Start with `'(.+)'`", PAGE)
    for dry_run in (one_node, all_nodes, [*one_node, few_steps], [*all_nodes, few_steps]):
        output = run_successfully(*dry_run, *settings, cwd=tmp_path).output
        assert re.search(r"distill +\d{4}-\d\d-\d\dT", output), "Slurm says when it could start"
    assert "`'only=[plan,import_hf,prepare_data]'`" in PAGE
    started = [word for word in one_node if word != "dry_run=true"]
    run_successfully(*started, "only=[plan,import_hf,prepare_data]", *settings, cwd=tmp_path)
    Run(tmp_path / "runs" / "qwen3_8b_depth_2.5b", ()).wait()

    chain = Run(tmp_path / RUN, ())
    run_successfully(*first, *settings, cwd=tmp_path)
    chain.wait()
    assert set(states(chain).values()) == {"complete"}

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
    chain.wait()
    assert set(states(chain).values()) == {"complete"}, status()
    require(chain.directory / "distill", whole_nodes(1, ranks=4))
    require(chain.directory / "export_hf", one_rank("export_hf"))
    assert records(chain.directory / "distill")[0]["SLURM_JOB_NAME"].startswith("first.distill.")
