"""Opens reports in headless Chromium: no errors, all plots visible, nothing wider than the page."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import signal
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from recipes.report.compare import render_comparison
from recipes.report.page import render
from recipes.report.settings import REPORT_FILE
from tests.support.pages import OPTIONAL_PLOTS, PLOTS
from tests.support.reports import CONFIG, make_inputs, make_optional_inputs, make_run

if TYPE_CHECKING:
    from pathlib import Path

PHONE = 390
"""Width of a phone's screen, in pixels."""
TIMEOUTS = (60, 60, 240)
"""Seconds that each attempt may take. Headless Chromium usually needs a few seconds, but sometimes
hangs. Then it is started again."""
COMPARISON_PLOTS = [
    f"plot-{quality}-{cost}"
    for quality in ("perplexity", "kl", "tasks")
    for cost in ("parameters", "disk", "latency")
]
"""Ids of the plots in a comparison of runs: each quality against each cost."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every section."""
    run = tmp_path_factory.mktemp("run") / "run"
    path = tmp_path_factory.mktemp("report") / REPORT_FILE
    render(CONFIG, {**make_inputs(run), **make_optional_inputs(run)}, path)
    return path


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two runs."""
    root = tmp_path_factory.mktemp("runs")
    runs = [make_run(root / "one"), make_run(root / "two", loss=3.65, speed=0.8, lr=3e-4)]
    render_comparison(runs, root / "compare.html")
    return root / "compare.html"


def chromium(profile: Path, page: Path, *options: str) -> str:
    """Opens a page in headless Chromium without network; returns Chromium's output.

    Args:
        profile: Prefix of the paths of the profile and of the output. Each attempt has its own.
        page: HTML file.
        options: More options for Chromium.
    """
    program = shutil.which("chromium")
    if not program:
        pytest.skip("chromium is not installed: apt-get install chromium")
    for attempt, seconds in enumerate(TIMEOUTS):
        command = [
            program, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}-{attempt}",
            *options, page.as_uri(),
        ]  # fmt: skip
        output = profile.with_name(f"{profile.name}-{attempt}.txt")
        # Not a pipe: Chromium's child processes may outlive Chromium and keep the pipe open.
        with output.open("w") as file, suppress(subprocess.TimeoutExpired):
            browser = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                assert browser.wait(seconds) == 0, output.read_text()
                return output.read_text()
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(browser.pid, signal.SIGKILL)
                browser.wait()
    pytest.fail(f"{program} hung in every attempt; their time limits were {TIMEOUTS} seconds")


def console_errors(output: str) -> list[str]:
    """Returns the messages in Chromium's output that a page wrote to the browser's console."""
    return [line for line in output.splitlines() if "CONSOLE" in line]


def inspect(page: Path, folder: Path, width: int = PHONE) -> tuple[dict[str, Any], list[str]]:
    """Returns the layout of the page in a frame of ``width`` pixels, and its console errors.

    The script of a page around the frame writes the layout as JSON into its title. All values are
    in pixels: ``width`` of the frame, ``content`` (the width that the page's content takes),
    ``plots`` (pairs of a plot's id and its height), and ``labels_left`` and ``labels_right``, the
    outer edges of the outermost plot labels.
    """
    wrapper = folder / "wrapper.html"
    wrapper.write_text(
        f"""<!doctype html><title>waiting</title>
        <iframe style="width:{width}px;height:800px;border:0"
                srcdoc="{html.escape(page.read_text(encoding="utf-8"))}"></iframe>
        <script>
        document.querySelector("iframe").onload = event => {{
          const inner = event.target.contentDocument, root = inner.documentElement;
          const plots = [...inner.querySelectorAll("[id^=plot-]")];
          const labels = [...inner.querySelectorAll(".plot text")];
          document.title = JSON.stringify({{
            width: root.clientWidth,
            content: Math.max(root.scrollWidth, inner.body.scrollWidth),
            plots: plots.map(p => [p.id, p.getBoundingClientRect().height]),
            labels_right: Math.max(...labels.map(t => t.getBoundingClientRect().right)),
            labels_left: Math.min(...labels.map(t => t.getBoundingClientRect().left)),
          }});
        }};
        </script>""",
        encoding="utf-8",
    )
    options = ("--dump-dom", "--virtual-time-budget=5000", "--enable-logging=stderr")
    output = chromium(folder / "profile", wrapper, *options)
    title = re.search(r"<title>({.*?})</title>", output)
    assert title, output[:500]  # the script did not run
    return json.loads(html.unescape(title.group(1))), console_errors(output)


@pytest.mark.parametrize(
    ("name", "width", "plots"),
    [
        ("page", PHONE, [*PLOTS, *OPTIONAL_PLOTS]),
        ("page", 1200, [*PLOTS, *OPTIONAL_PLOTS]),
        ("comparison", PHONE, COMPARISON_PLOTS),
    ],
)
def test_page_shows_all_plots_within_its_width(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, width: int, plots: list[str]
) -> None:
    layout, errors = inspect(request.getfixturevalue(name), tmp_path, width)
    assert errors == []
    assert layout["content"] <= layout["width"] <= width
    assert 0 <= layout["labels_left"] < layout["labels_right"] <= layout["width"]
    # A plot that failed to render has almost no height.
    assert {plot for plot, height in layout["plots"] if height > 50} == set(plots)


def test_browser_reports_content_that_the_content_security_policy_blocks(
    tmp_path: Path, page: Path
) -> None:
    """The tests for an empty list of errors are valid only if the browser reports errors."""
    text = page.read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace("<main>", '<main><img src="http://127.0.0.1:9/x.png">'))
    _, errors = inspect(broken, tmp_path)
    assert errors


def test_dark_mode_changes_the_page(page: Path, tmp_path: Path) -> None:
    images = {}
    for mode, scheme in (("light", 1), ("dark", 0)):  # Chromium's numbers of the color schemes
        scheme_option = f"--blink-settings=preferredColorScheme={scheme}"
        screenshot = tmp_path / f"{mode}.png"
        options = (scheme_option, f"--screenshot={screenshot}", "--enable-logging=stderr")
        assert console_errors(chromium(tmp_path / "profile", page, *options)) == []
        images[mode] = screenshot.read_bytes()
        assert images[mode].startswith(b"\x89PNG")
    assert images["light"] != images["dark"]
