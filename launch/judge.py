"""The last word on a run: do the figures that it measured pass its gates?

Gates are judged here and not in a stage. A failing one then leaves every result in place, report
and export included; another threshold runs nothing again; and the same command gives the same
answer in a second, also for a run whose stages were queued elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from launch.plan import Plan
from recipes.core.errors import RecipeError
from recipes.core.screen import plain_table
from recipes.report.gates import Gate, Verdict, judge


def require_gates(plan: Plan, console: Console) -> None:
    """Shows what was measured for each gate of a run that was carried out; refuses one that failed.

    A gate is passed over, and said to be, while the stage that measures its figure is not part of
    the run (``only``) or not complete.
    """
    if not plan.gates:
        return
    # Of several evaluations the last counts: the final model's.
    results = {made.kind: made for stage in plan.stages if (made := stage.made) is not None}
    verdicts = judge(plan.gates, results)
    judged = [verdict.gate for verdict in verdicts]
    unjudged = [gate for gate in plan.gates if gate not in judged]
    console.print(_table(verdicts, unjudged))
    failed = [verdict for verdict in verdicts if not verdict.passed]
    if failed:
        raise RecipeError(
            f"{len(failed)} of {len(plan.gates)} gates failed: {'; '.join(map(str, failed))}.",
            f"the results are in {plan.run_dir}; distil longer, prune less, or set other "
            "gates (with few items difference_low.TASK says more than recovered.TASK)",
        )


def _table(verdicts: Iterable[Verdict], unjudged: Iterable[Gate]) -> Table:
    table = plain_table("gates", "gate", "measured", "")
    for verdict in verdicts:
        value = "not measurable" if verdict.measured is None else f"{verdict.measured:.4g}"
        table.add_row(str(verdict.gate), value, "passed" if verdict.passed else "[bold]FAILED")
    for gate in unjudged:
        table.add_row(str(gate), "not measured in this run", "not judged")
    return table
