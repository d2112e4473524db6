"""The card from manifests alone: optional inputs add what they know."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from recipes.core.manifest import Manifest
from recipes.report.model_card import write_card
from recipes.stages import export_hf
from tests.support.reports import make_inputs, optional_inputs

TEACHER, RECIPE = "some/SmallLM-135M", "llama_width_prune"


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Manifest]:
    run = tmp_path / "run"
    found = {**make_inputs(run), **optional_inputs(run)}
    names = {"checkpoint": "distilled", **{n: n for n in ("evaluation", "teacher", "pruned")}}
    names |= {"data": "data", "tasks": "tasks"}
    return {name: found[key].manifest for name, key in names.items()}


def card(folder: Path, inputs: dict[str, Manifest], teacher_card: str = "") -> str:
    (folder / "README.md").write_text(teacher_card)
    write_card(folder, TEACHER, RECIPE, inputs)
    return (folder / "README.md").read_text(encoding="utf-8")


def test_every_input_adds_what_it_knows(inputs: dict[str, Manifest], tmp_path: Path) -> None:
    text = card(tmp_path, inputs, "---\nlicense: apache-2.0\n---\n# Teacher")
    assert "license: apache-2.0" in text
    [index] = yaml.safe_load(text.split("---")[1])["model-index"]
    figures = {
        (r["dataset"]["name"], m["type"]): m["value"]
        for r in index["results"]
        for m in r["metrics"]
    }
    assert figures["sciq", "acc"] == 0.79
    assert {kind for _, kind in figures} == {"perplexity", "kl_to_teacher", "acc", "acc_norm"}
    assert "| teacher | 30 | 576 | 1536 | 9 | 3 | 64 | 49152 | 134,515,008 |" in text
    assert "| this model | 24 | 512 | 1152 | 9 | 3 | 64 | 49152 | 86,532,608 |" in text
    assert "Layers dropped, counted from 1: 9, 12, 13, 17, 20, 21." in text
    assert "Distilled on 409,600 tokens in 400 steps." in text
    assert "`hf://some/corpus@en:train`. Licence: CC-BY-4.0." in text
    assert "| sciq | acc | 200 | 0.845 ± 0.026 | 0.415 ± 0.035 | 0.790 ± 0.029 |" in text
    assert "took back 79% of the loss" in text
    assert "```text\nvllm serve .\ntrtllm-serve .\n```" in text
    assert "```text\noptimum-cli export openvino --model . " in text
    assert "--outfile model.gguf\nllama-server -m model.gguf\n```" in text
    assert "in float32 on 10,098 predictions of a next token of held-out text in windows" in text


def test_optional_inputs_may_be_missing(inputs: dict[str, Manifest], tmp_path: Path) -> None:
    bare = {name: inputs[name] for name in (*export_hf.STAGE.inputs, "evaluation")}
    bare["evaluation"].metrics |= {"recovered": None, "predictions": None}
    text = card(tmp_path, bare)
    assert "in float32 on 10,240 held-out tokens in windows of 256" in text
    assert "| this model | 24 |" in text
    assert "was not found in its folder" in text
    for absent in ("| teacher | 30 |", "## Tasks", "Text:", "took back", "None"):
        assert absent not in text


def test_places_of_local_files_stay_private(inputs: dict[str, Manifest], tmp_path: Path) -> None:
    private = "/home/someone/private/my.jsonl"
    inputs["data"].metrics["sources"] = [f"{private}#name=x", f"teacher://chat#prompts={private}"]
    text = card(tmp_path, inputs)
    assert "`my.jsonl`. Licence: not recorded." in text
    assert "`teacher://chat`." in text
    assert "/home" not in text


def test_names_of_others_are_no_markup(inputs: dict[str, Manifest], tmp_path: Path) -> None:
    """Of models, recipes, documents, tasks and licences; the header is still one of YAML."""
    nasty = "x`|<script>alert(1)</script>\n---\n# Title\n[a](javascript:b)![c](d)"
    inputs["data"].metrics["sources"] = [f"hf://{nasty}:train", nasty]
    tasks = inputs["tasks"].metrics["tasks"]
    inputs["tasks"].metrics["tasks"] = {nasty: {**tasks["sciq"], "metric": nasty}}
    (tmp_path / "README.md").write_text('---\nlicense: "a":b\n---\n')
    write_card(tmp_path, nasty, nasty, inputs)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    _, header, body = text.split("---\n", 2)
    found = yaml.safe_load(header)
    assert (found["base_model"], found["license"]) == (" ".join(nasty.split()), '"a":b')
    assert "<" not in body
    assert "](" not in body
    assert body.count("\n# ") == 1
    assert not [line for line in body.splitlines() if line.replace("```", "").count("`") % 2]
    rows = [line for line in body.splitlines() if line.startswith("| x script")]
    assert [row.count("|") for row in rows] == [7]


@pytest.mark.parametrize(
    ("teacher", "name"),
    [
        ("meta-llama/Llama-3.2-1B", "Llama-3.2-1B"),
        ("/models/my_llama/", "my_llama"),
        ("pypi://a/0.1/b/Small.Q4_1.gguf#sha256=bcc8", "Small.Q4_1"),
    ],
)
def test_name(inputs: dict[str, Manifest], tmp_path: Path, teacher: str, name: str) -> None:
    write_card(tmp_path, teacher, RECIPE, inputs)
    assert f"# {name}-llama_width_prune\n" in (tmp_path / "README.md").read_text()
