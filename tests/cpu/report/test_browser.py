"""Reports in a real browser: no errors, every plot drawn, nothing wider than the screen."""

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
from tests.support.reports import (
    CONFIG,
    OPTIONAL_PLOTS,
    PHONE,
    PLOTS,
    make_inputs,
    make_run,
    optional_inputs,
)

if TYPE_CHECKING:
    from pathlib import Path

PATIENCE = (60, 60, 240)
"""Seconds of each try: headless Chromium hangs now and then, and takes seconds if it does not."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every section that there is."""
    run = tmp_path_factory.mktemp("run") / "run"
    path = tmp_path_factory.mktemp("report") / REPORT_FILE
    render(CONFIG, {**make_inputs(run), **optional_inputs(run)}, path)
    return path


def chromium(profile: Path, page: Path, *options: str) -> str:
    """Opens a page headless, with no network, and returns what the browser printed."""
    program = shutil.which("chromium")
    if not program:
        pytest.skip("chromium is not installed: apt-get install chromium")
    for number, seconds in enumerate(PATIENCE):
        command = [
            program, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}-{number}",
            *options, page.as_uri(),
        ]  # fmt: skip
        said = profile.with_name(f"{profile.name}-{number}.txt")
        # Its helpers outlive it now and then: they would hold a pipe open, but not a file.
        with said.open("w") as file, suppress(subprocess.TimeoutExpired):
            browser = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                assert browser.wait(seconds) == 0, said.read_text()
                return said.read_text()
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(browser.pid, signal.SIGKILL)
                browser.wait()
    pytest.fail(f"{program} did not end within {PATIENCE} seconds")


def test_browser_shows_page_without_errors(page: Path, tmp_path: Path) -> None:
    output = chromium(tmp_path / "profile", page, "--dump-dom", "--enable-logging=stderr")
    assert "CONSOLE" not in output
    found = re.search(r"<title>(.*?)</title>", output)
    assert found
    assert found.group(1) == CONFIG.title
    assert all(f'id="{name}"' in output for name in (*PLOTS, *OPTIONAL_PLOTS))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs side by side."""
    root = tmp_path_factory.mktemp("runs")
    runs = [make_run(root / "one"), make_run(root / "two", loss=3.65, speed=0.8, lr=3e-4)]
    render_comparison(runs, root / "compare.html")
    return root / "compare.html"


def test_comparison_has_its_plots_and_fits_a_phone(comparison: Path, tmp_path: Path) -> None:
    output = chromium(tmp_path / "console", comparison, "--dump-dom", "--enable-logging=stderr")
    assert "CONSOLE" not in output
    layout = measured(comparison, tmp_path, PHONE)
    assert layout["content"] <= layout["width"] <= PHONE
    assert 0 <= layout["left"] < layout["labels"] <= layout["width"]
    drawn = {name for name, height in layout["plots"] if height > 50}
    assert drawn == {
        f"plot-{quality}-{cost}"
        for quality in ("perplexity", "kl", "tasks")
        for cost in ("parameters", "disk", "latency")
    }


def test_browser_reports_what_the_policy_blocks(tmp_path: Path, page: Path) -> None:
    """Without this, a page free of errors would prove nothing."""
    text = page.read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace("<main>", '<main><img src="http://127.0.0.1:9/x.png">'))
    output = chromium(tmp_path / "profile", broken, "--dump-dom", "--enable-logging=stderr")
    assert "CONSOLE" in output


def measured(page: Path, folder: Path, width: int) -> dict[str, Any]:
    """Layout of the page in a frame of ``width`` pixels."""
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
            labels: Math.max(...labels.map(t => t.getBoundingClientRect().right)),
            left: Math.min(...labels.map(t => t.getBoundingClientRect().left)),
          }});
        }};
        </script>""",
        encoding="utf-8",
    )
    output = chromium(folder / "profile", wrapper, "--dump-dom", "--virtual-time-budget=5000")
    found = re.search(r"<title>({.*?})</title>", output)
    assert found, output[:500]
    layout: dict[str, Any] = json.loads(html.unescape(found.group(1)))
    return layout


@pytest.mark.parametrize("width", [PHONE, 1200])
def test_page_fits_its_width(page: Path, tmp_path: Path, width: int) -> None:
    layout = measured(page, tmp_path, width)
    assert layout["content"] <= layout["width"] <= width
    assert 0 <= layout["left"] < layout["labels"] <= layout["width"]
    assert {name for name, height in layout["plots"] if height > 50} == {*PLOTS, *OPTIONAL_PLOTS}


def test_screenshot_differs_in_the_dark(page: Path, tmp_path: Path) -> None:
    shots = [tmp_path / "light.png", tmp_path / "dark.png"]
    for scheme, shot in zip(("1", "0"), shots, strict=True):
        chromium(
            tmp_path / "profile",
            page,
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--screenshot={shot}",
        )
        assert shot.read_bytes().startswith(b"\x89PNG")
    assert shots[0].read_bytes() != shots[1].read_bytes()
