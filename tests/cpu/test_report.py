from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest

from recipes import distill, evaluate, export_hf, import_hf, prepare_data, prune, report
from recipes.architecture import Architecture
from recipes.manifest import ARTIFACT, FileStamp, Manifest, read_manifest, write_manifest
from recipes.metrics import METRICS, MetricsLog
from recipes.report_page import render
from recipes.report_plots import Axis, Series, layer_plot, line_plot
from recipes.stage import Input, StageConfig

if TYPE_CHECKING:
    from pathlib import Path

LAYERS, DROPPED = 30, (9, 12, 13, 17, 20, 21)
TEACHER = Architecture("LlamaForCausalLM", LAYERS, 576, 1536, 9, 3, 64, 49152, 8192, True)
STUDENT = replace(TEACHER, num_layers=LAYERS - len(DROPPED), hidden_size=512, ffn_hidden_size=1152)
STEPS = 400
PLOTS = (
    "plot-quality",
    "plot-loss",
    "plot-val-loss",
    "plot-lr",
    "plot-grad-norm",
    "plot-layers",
    "plot-sizes",
    "plot-cost",
)
NASTY = "<script>document.title = 'owned'</script> & <b>bold</b>"
PHONE = 390


def wobble(step: int) -> float:
    return math.sin(step * 12.9898) * 0.5 + math.sin(step * 4.1414) * 0.5


def quality() -> dict[str, Any]:
    figures = {
        "teacher": (3.0214, 0.0412, 0.0, 1.0, TEACHER),
        "pruned": (6.8437, 0.0655, 3.9106, 0.1817, STUDENT),
        "distilled": (3.8125, 0.0467, 0.7231, 0.6042, STUDENT),
    }
    results = {
        role: {
            "loss": loss,
            "loss_standard_error": error,
            "perplexity": math.exp(loss),
            "kl_to_teacher": kl,
            "top1_agreement": agreement,
            "parameters": shape.parameters(),
        }
        for role, (loss, error, kl, agreement, shape) in figures.items()
    }
    return {**results, "windows": 40, "tokens": 10240, "recovered": 0.7930616922}


def generations() -> list[dict[str, str]]:
    return [
        {
            "prompt": "The Danube is Europe's second-longest river, which",
            "text": " flows south-east for 2,850 km, through ten countries, into the Black Sea.",
            "teacher": " flows through Germany, Austria, Hungary and Romania to the Black Sea.\n\n",
            "pruned": " the the of of the and the the, the of the, of the and and the of the the",
            "distilled": " flows through Austria, Slovakia and Hungary before it reaches the sea.",
        },
        {
            "prompt": "A prime number is a natural number greater than 1 that",
            "text": " is not a product of two smaller natural numbers.",
            "teacher": NASTY,
            "pruned": "AAAA" * 60,
            "distilled": " is a product of two or more natural numbers, such as 東京 or Привет.",
        },
    ]


def stage(
    root: Path,
    config: StageConfig,
    kind: str,
    files: dict[str, int],
    metrics: dict[str, Any] | None = None,
    shape: Architecture | None = None,
) -> Input:
    """Writes a stage's manifest as a run would, and reads it back; files are only stamps."""
    number = len(list(root.iterdir()))
    directory = root / config.stage
    (directory / ARTIFACT).mkdir(parents=True)
    data = json.loads(json.dumps(config, default=lambda value: vars(value)))
    manifest = Manifest(
        stage=config.stage,
        kind=kind,
        fingerprint=f"{number:x}f3c" * 16,
        config=data,
        code=f"c0de{number:x}" + "ab" * 29 + "c",
        inputs={},
        files={name: FileStamp(size, (f"{size:x}" * 64)[:64], 0) for name, size in files.items()},
        metrics=metrics or {},
        architecture=shape.as_dict() if shape else None,
        parameters=shape.parameters() if shape else None,
        tokenizer_sha256="70ce" * 16 if kind != "eval_results" else None,
        versions={"python": "3.11.9", "torch": "2.9.1", "nemo_toolkit": "2.7.3"},
        git_sha="0123456789abcdef0123456789abcdef01234567-dirty",
        started_at=f"2025-03-04T1{number}:20:30+00:00",
        seconds=(41.302, 12.877, 208.55, 4123.019, 377.4, 25.2)[number],
        peak_rss_bytes=1_234_567_890 + 700_000_000 * number,
    )
    write_manifest(directory, manifest)
    found = read_manifest(directory)
    assert found
    return Input(directory, found)


def checkpoint(shape: Architecture) -> dict[str, int]:
    return {
        "model.nemo/context/model.yaml": 4321,
        "model.nemo/context/tokenizer.json": 2_104_556,
        "model.nemo/weights/__0_0.distcp": 4 * shape.parameters(),
        "model.nemo/weights/metadata.json": 118,
    }


def log_training(directory: Path, lm_weight: float) -> None:
    log = MetricsLog(directory / METRICS)
    for step in range(1, STEPS + 1):
        kd = 0.7 + 3 * math.exp(-step / 70) + 0.12 * wobble(step)
        lm = kd + 2.9 + 0.1 * wobble(step + 7)
        log.progress(
            "distill",
            step,
            STEPS,
            loss=kd + lm_weight * lm,
            kd=kd,
            lm=lm if lm_weight else 0.0,
            lr=1e-4 * min(step / 20, 0.55 + 0.45 * math.cos(math.pi * step / STEPS)),
            tokens_per_second=1210.4,
            grad_norm=1.1 + 4 * math.exp(-step / 40) + 0.3 * wobble(step + 3),
        )
        if step % 50 == 0:
            log.progress("validate", step, STEPS, val_loss=3.75 + 2.6 * math.exp(-step / 80))


def make_inputs(root: Path, *, lm_weight: float = 0.0) -> dict[str, Input]:
    root.mkdir()
    importance = {str(n): 0.07 + 0.3 / n + 0.02 * wobble(n) for n in range(1, LAYERS + 1)}
    kept = [n for n in range(1, LAYERS + 1) if n not in DROPPED]
    parts = {"train": 812_345, "validation": 17_001, "calibration": 34_567, "heldout": 33_210}
    documents = {part: tokens // 90 for part, tokens in parts.items()}
    source = "hf://some/corpus@en:train"
    parity = {"parity_max_logit_difference": 0.00011444091796875, "parity_tokens": 128}
    made = {
        "teacher": stage(
            root,
            import_hf.Config("import_hf", hf_path="some/SmallLM-135M-Instruct"),
            "checkpoint_nemo",
            checkpoint(TEACHER),
            {**parity, "licence": "apache-2.0"},
            TEACHER,
        ),
        "data": stage(
            root,
            prepare_data.Config("prepare_data", sources=[source]),
            "dataset",
            {f"{part}.{end}": 2 * count for part, count in parts.items() for end in ("bin", "idx")},
            {"documents": documents, "tokens": parts, "sources": [source]},
        ),
        "pruned": stage(
            root,
            prune.Config(
                "prune", drop_layers=list(DROPPED), target_hidden_size=512,
                target_ffn_hidden_size=1152,
            ),
            "checkpoint_nemo",
            {**checkpoint(STUDENT), "importance.json": 900},
            {
                "kept_layers": kept,
                "layer_importance": importance,
                "calibration_tokens": 16384,
                "teacher_parameters": TEACHER.parameters(),
            },
            STUDENT,
        ),
        "distilled": stage(
            root,
            distill.Config("distill", max_steps=STEPS, lm_weight=lm_weight),
            "checkpoint_nemo",
            checkpoint(STUDENT),
            {"steps": STEPS, "tokens": STEPS * 1024, "tokens_per_second": 1210.4, "val_loss": 3.77},
            STUDENT,
        ),
        "evaluation": stage(
            root,
            evaluate.Config("evaluate"),
            "eval_results",
            {"results.json": 7890},
            quality(),
        ),
        "exported": stage(
            root,
            export_hf.Config("export_hf"),
            "checkpoint_hf",
            {"model.safetensors": 4 * STUDENT.parameters(), "config.json": 715},
            {**parity, "parity_max_logit_difference": 9.1552734375e-05},
            STUDENT,
        ),
    }  # fmt: skip
    log_training(made["distilled"].directory, lm_weight)
    windows = {
        role: [quality()[role]["loss"] + 0.2 * wobble(n) for n in range(40)]
        for role in ("teacher", "pruned", "distilled")
    }
    detail = {"window_losses": windows, "generations": generations()}
    (made["evaluation"].artifact / "results.json").write_text(json.dumps(detail))
    return made


CONFIG = report.Config(
    "report",
    title="llama_width_prune",
    description="Narrow a Llama-style model and drop layers by importance, then distil",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Input]:
    return make_inputs(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def page(inputs: dict[str, Input], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / report.FILE
    render(CONFIG, inputs, path)
    return path


class Page(HTMLParser):
    """Tags, ``<data>`` values and text of a page; fails on tags that do not nest."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[str]:
        return [attrs[name] for _, attrs in self.tags if name in attrs]

    def figures(self) -> set[float]:
        return {float(attrs["value"]) for tag, attrs in self.tags if tag == "data"}


def rendered(inputs: dict[str, Input], folder: Path, cfg: report.Config = CONFIG) -> str:
    render(cfg, inputs, folder / report.FILE)
    return (folder / report.FILE).read_text(encoding="utf-8")


def changed(item: Input, **metrics: Any) -> Input:
    return replace(item, manifest=replace(item.manifest, metrics=metrics))


def every_number(value: Any) -> set[float]:
    if isinstance(value, dict):
        return {n for v in value.values() for n in every_number(v)}
    return {float(value)} if isinstance(value, int | float) else set()


def test_figures_are_the_manifests_figures(page: Path, inputs: dict[str, Input]) -> None:
    shown = Page(page.read_text(encoding="utf-8")).figures()
    manifests = {name: item.manifest for name, item in inputs.items()}
    expected = every_number(manifests["evaluation"].metrics)
    expected |= every_number(manifests["teacher"].metrics)
    expected |= every_number(manifests["exported"].metrics)
    expected |= every_number(manifests["data"].metrics)
    expected.add(manifests["pruned"].metrics["calibration_tokens"])
    expected.add(1 - STUDENT.parameters() / TEACHER.parameters())
    for shape in (TEACHER, STUDENT):
        axes = set(shape.as_dict()) - {"max_position_embeddings", "tied_embeddings"}
        expected |= every_number({axis: getattr(shape, axis) for axis in axes})
        expected.add(shape.parameters())
    for manifest in manifests.values():
        expected |= {manifest.seconds, manifest.peak_rss_bytes, manifest.total_bytes()}
        expected |= {stamp.size for stamp in manifest.files.values()}
    for key in ("max_steps", "global_batch_size", "seq_length", "lr", "min_lr", "warmup_steps"):
        expected.add(manifests["distilled"].config[key])
    assert expected <= shown


def test_figures_are_rounded_for_reading(page: Path) -> None:
    text = " ".join(Page(page.read_text(encoding="utf-8")).text.split())
    assert "86.5 M of the teacher’s 134.5 M parameters. Pruning took" in text
    assert "from 3.021 to 6.844; distillation on 409.6 K tokens brought it to 3.812." in text
    for figure in ("79.3%", "35.7%", "938.0", "540.2 MB", "1 h 08 min", "4.0 GB", "1.14e−4"):
        assert figure in text


def test_page_is_self_contained(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = Page(text)
    assert text.startswith("<!doctype html>")
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {t for t, _ in found.tags}
    assert found.values("src") == found.values("xlink:href") == []
    assert {link.removeprefix("#") for link in found.values("href")} <= set(found.values("id"))
    assert not re.search(r"https?:|url\(|@import", text)
    ids = found.values("id")
    assert len(ids) == len(set(ids))
    assert set(PLOTS) <= set(ids)
    assert str(page.parent) not in text


def test_provenance_names_every_stage_and_file(page: Path, inputs: dict[str, Input]) -> None:
    found = Page(page.read_text(encoding="utf-8"))
    titles = set(found.values("title"))
    for item in inputs.values():
        manifest = item.manifest
        assert {manifest.fingerprint, manifest.code, manifest.git_sha} <= titles
        assert {stamp.sha256 for stamp in manifest.files.values()} <= titles
        assert manifest.stage in found.text
        assert manifest.started_at.replace("T", " ") in found.text
        assert all(version in found.text for version in manifest.versions.values())


def test_text_of_models_and_users_is_escaped(inputs: dict[str, Input], tmp_path: Path) -> None:
    text = rendered(inputs, tmp_path, replace(CONFIG, title=NASTY, description=NASTY))
    assert "<script" not in text
    assert text.count(html.escape(NASTY).replace("&#x27;", "&#39;")) == 4
    assert NASTY in Page(text).text


def test_layers_are_marked_kept_or_dropped(page: Path) -> None:
    found = Page(page.read_text(encoding="utf-8"))
    bars = [c.split()[1] for c in found.values("class") if c.startswith("bar ")]
    legend, bars = bars[:2], bars[2:]
    assert legend == ["kept", "dropped"]
    assert [n for n, fate in enumerate(bars, 1) if fate == "dropped"] == list(DROPPED)
    assert len(bars) == LAYERS
    assert "dropped: 9, 12, 13, 17, 20, 21, as the recipe named them" in found.text


@pytest.mark.parametrize(
    ("lm_weight", "terms"),
    [(0.0, ["logits"]), (0.5, ["logits", "next token", "total"])],
)
def test_only_loss_terms_in_use_are_drawn(
    tmp_path: Path, lm_weight: float, terms: list[str]
) -> None:
    text = rendered(make_inputs(tmp_path / "run", lm_weight=lm_weight), tmp_path)
    section = text[text.index('<section id="distillation">') : text.index('id="plot-loss"')]
    assert [label for label in re.findall(r"</svg>([^<]+)</span>", section)] == terms


def test_nothing_lost_nothing_recovered(inputs: dict[str, Input], tmp_path: Path) -> None:
    evaluation = changed(inputs["evaluation"], **{**quality(), "recovered": None})
    text = rendered({**inputs, "evaluation": evaluation}, tmp_path)
    assert "there was nothing to recover" in Page(text).text
    assert "None" not in text


@pytest.mark.parametrize("share", [-0.4, 1.2])
def test_recovered_may_lie_outside_0_to_1(
    inputs: dict[str, Input], tmp_path: Path, share: float
) -> None:
    evaluation = changed(inputs["evaluation"], **{**quality(), "recovered": share})
    text = rendered({**inputs, "evaluation": evaluation}, tmp_path)
    assert share in Page(text).figures()
    assert 'width="-' not in text


def test_targets_by_number_of_layers(inputs: dict[str, Input], tmp_path: Path) -> None:
    config = asdict(prune.Config("prune", target_num_layers=24))
    pruned = replace(inputs["pruned"], manifest=replace(inputs["pruned"].manifest, config=config))
    text = Page(rendered({**inputs, "pruned": pruned}, tmp_path)).text
    assert re.search(r"Pruning targets\s+Layers24\s*Calibration windows", text)
    assert "dropped: 9, 12, 13, 17, 20, 21." in text


def test_pruning_of_width_keeps_every_layer(inputs: dict[str, Input], tmp_path: Path) -> None:
    metrics = {**inputs["pruned"].manifest.metrics, "kept_layers": list(range(1, LAYERS + 1))}
    text = rendered({**inputs, "pruned": changed(inputs["pruned"], **metrics)}, tmp_path)
    assert "All 30 layers were kept." in Page(text).text
    assert "bar dropped" not in text


def test_optional_records_may_be_missing(inputs: dict[str, Input], tmp_path: Path) -> None:
    figures = {role: {"loss": 3.0, "perplexity": 20.1} for role in ("teacher", "pruned")}
    bare = {name: Input(tmp_path / name, changed(item).manifest) for name, item in inputs.items()}
    for name, item in bare.items():
        config = {} if name != "data" else item.manifest.config
        manifest = replace(
            item.manifest, config=config, architecture=None, parameters=None, versions={},
            git_sha=None, files={},
        )  # fmt: skip
        bare[name] = replace(item, manifest=manifest)
    bare["evaluation"] = changed(bare["evaluation"], **figures)
    text = rendered(bare, tmp_path, report.Config("report"))
    for note in ("No training steps were logged", "No layer importance", "No text was generated"):
        assert note in text
    assert "None" not in Page(text).text


def test_one_dominant_layer_does_not_flatten_the_rest() -> None:
    scores = {1: 16.1, 2: 2.6, **{layer: 0.4 + layer / 100 for layer in range(3, 31)}}
    plot = layer_plot("plot-layers", "Layers", scores, set(scores))
    heights = [float(h) for h in re.findall(r'class="bar kept".*?height="([\d.]+)%"', plot)]
    assert len(heights) == 30
    assert min(heights) > 10
    assert heights.index(min(heights)) + 1 == min(scores, key=scores.__getitem__)


def test_layer_scores_of_zero_are_drawn() -> None:
    assert layer_plot("plot-layers", "Layers", {1: 0.0, 2: 5.0, 3: 0.0}, {2}).count("<rect") == 3
    assert layer_plot("plot-layers", "Layers", {1: 0.0}, {1}).count("<rect") == 1


def test_long_runs_stay_small() -> None:
    points = [(float(n), wobble(n)) for n in range(1, 100_001)]
    plot = line_plot("plot-long", "Long", [Series("loss", "total", points)])
    assert len(plot) < 50_000
    assert "100,000" in plot


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (2.9, 7.1, [3, 4, 5, 6, 7]), (0, 1e-4, None), (-1, 1, None)],
)
def test_ticks_are_round_and_inside(low: float, high: float, ticks: list[float] | None) -> None:
    found = Axis(low, high).ticks()
    assert ticks is None or found == pytest.approx(ticks)
    assert 3 <= len(found) <= 7
    assert all(low <= tick <= high * (1 + 1e-9) for tick in found)


def chromium(profile: Path, page: Path, *options: str) -> str:
    """Opens a page headless, with no network, and returns what the browser printed."""
    program = shutil.which("chromium")
    if not program:
        pytest.skip("chromium is not installed: apt-get install chromium")
    command = [
        program, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", *options,
        page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout + done.stderr


def test_browser_shows_page_without_errors(page: Path, tmp_path: Path) -> None:
    output = chromium(tmp_path / "profile", page, "--dump-dom", "--enable-logging=stderr")
    assert "CONSOLE" not in output
    found = re.search(r"<title>(.*?)</title>", output)
    assert found
    assert found.group(1) == CONFIG.title
    assert all(f'id="{name}"' in output for name in PLOTS)


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
    assert {name for name, height in layout["plots"] if height > 50} == set(PLOTS)


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
