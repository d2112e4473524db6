"""Model cards, and commands that serve a run's models."""

from __future__ import annotations

import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from nemo_convert.architecture import Architecture
from nemo_convert.licences import forbids_commercial_use, known_licence
from recipes.core.manifest import Acceptance, Manifest
from recipes.core.stage import Input
from recipes.evaluation.results import SourceQuality, TextQuality
from recipes.report.model_card import write_card
from recipes.report.serving import conversion_servers, run_servers
from recipes.stages import export_hf
from tests.support.reports import make_inputs, make_optional_inputs, with_result
from tests.support.results import RESULTS, STUDENT
from tests.support.results import TEACHER as TEACHER_SHAPE

TEACHER, RECIPE = "some/SmallLM-135M", "llama_width_prune"


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Input]:
    run = tmp_path / "run"
    report_inputs = {**make_inputs(run), **make_optional_inputs(run)}
    names = ("evaluation", "teacher", "data", "tasks")
    data = report_inputs["data"].manifest
    report_inputs["evaluation"].manifest.inputs["data"] = data.fingerprint
    return {
        "checkpoint": report_inputs["distilled"],
        **{name: report_inputs[name] for name in names},
    }


def render_card(folder: Path, inputs: dict[str, Input], teacher_card: str = "") -> str:
    (folder / "README.md").write_text(teacher_card)
    write_card(folder, TEACHER, RECIPE, inputs, {})
    return (folder / "README.md").read_text(encoding="utf-8")


def test_every_input_adds_lines_to_the_card(inputs: dict[str, Input], tmp_path: Path) -> None:
    inputs["tasks"].manifest.config["limit"] = 100
    text = render_card(tmp_path, inputs, "---\nlicense: apache-2.0\n---\n# Teacher")
    header = yaml.safe_load(text.split("---")[1])
    assert header["license"] == "apache-2.0"
    [index] = header["model-index"]
    values = {
        (r["dataset"]["name"], m["type"]): m["value"]
        for r in index["results"]
        for m in r["metrics"]
    }
    assert values["sciq", "acc"] == 0.79
    benchmarks = {r["dataset"]["name"]: r["dataset"] for r in index["results"]}
    assert benchmarks["sciq"]["split"] == "validation"
    assert benchmarks["sciq"]["args"] == {"num_fewshot": 0, "limit": 100}
    assert {kind for _, kind in values} == {"perplexity", "kl_to_teacher", "acc", "acc_norm"}
    for line in (
        "| teacher | 30 | 576 | 1536 | 9 | 3 | 64 | 49152 | 134,515,008 |\n",
        "| this model | 24 | 512 | 1152 | 9 | 3 | 64 | 49152 | 86,532,608 |\n",
        "| distilled | 86.5 M | 3.812 ± 0.047 | 45.3 | 0.723 | 60.4% |\n",
        "| sciq | acc | 200 | 0.845 ± 0.026 | 0.415 ± 0.035 | 0.790 ± 0.029 |\n",
        "Layers dropped, counted from 1: 9, 12, 13, 17, 20, 21.\n",
        "Distilled on 409,600 tokens in 400 steps.\n",
        "Tokens from text: 409,600, 4.50 epochs.\n",
        "`hf://some/corpus@en:train`. Licence: CC-BY-4.0.\n",
        "recovered 79% of the loss",
        "in float32 on 10,098 next-token predictions",
        "```text\nvllm serve .\ntrtllm-serve .\n```\n",
        "```text\noptimum-cli export openvino --model . ",
        "--outfile model.gguf\nllama-server -m model.gguf\n```\n",
    ):
        assert line in text


def test_each_text_has_its_own_results_in_the_header(
    inputs: dict[str, Input], tmp_path: Path
) -> None:
    """The hub's library merges results that it cannot tell apart."""
    names = ["wikipedia", "code", "mail"]
    model = TextQuality(4.0, 0.05, 54.6, 0.4, 0.6)
    sources = {name: SourceQuality(model, model, model, 20, 5120, 5100, None) for name in names}
    evaluation = replace(RESULTS["evaluate"], sources=sources)
    inputs["evaluation"] = with_result(inputs["evaluation"], evaluation)
    render_card(tmp_path, inputs)
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    texts = [result.dataset_name for result in results if result.dataset_type == "text"]
    assert texts == [name for name in names for metric in ("perplexity", "kl_to_teacher")]


def test_a_card_says_if_distillation_raised_the_loss(
    inputs: dict[str, Input], tmp_path: Path
) -> None:
    assert "recovered 79%" in render_card(tmp_path, inputs)
    inputs["evaluation"].manifest.metrics["recovered"] = -0.4
    text = render_card(tmp_path, inputs)
    assert "-40%" not in text
    assert "raised" in text


@pytest.mark.parametrize(("hidden_size", "needs_version_4"), [(512, True), (576, False)])
def test_the_card_of_a_model_that_transformers_5_refuses_names_version_4(
    inputs: dict[str, Input], tmp_path: Path, hidden_size: int, needs_version_4: bool
) -> None:
    shape = replace(STUDENT, hidden_size=hidden_size)
    inputs["checkpoint"].manifest.architecture = shape.as_dict()
    assert ('pip install "transformers==4.*"' in render_card(tmp_path, inputs)) == needs_version_4


def test_optional_inputs_may_be_missing(inputs: dict[str, Input], tmp_path: Path) -> None:
    bare = {name: inputs[name] for name in (*export_hf.STAGE.inputs, "evaluation")}
    bare["evaluation"].manifest.metrics["recovered"] = None
    text = render_card(tmp_path, bare)
    assert "| this model | 24 |" in text
    assert "was not found in its folder" in text
    for absent in ("| teacher | 30 |", "## Tasks", "Text:", "Distillation recovered", "None"):
        assert absent not in text


def test_licences_of_weights_and_text_are_stated_separately(
    inputs: dict[str, Input], tmp_path: Path
) -> None:
    teacher_card = "---\nlicense: apache-2.0\n---\n"
    text = render_card(tmp_path, inputs, teacher_card)
    assert "Licence of the weights: the base model's, apache-2.0. Made with" in text
    [source] = inputs["data"].manifest.metrics["sources"]
    inputs["data"].manifest.metrics["origins"] = {source: {"licence": "CC-BY-NC-4.0"}}
    text = render_card(tmp_path, inputs, teacher_card)
    assert "Licence: CC-BY-NC-4.0 (no commercial use).\n" in text
    assert "The licence of the training\ntext forbids commercial use: CC-BY-NC-4.0. Made" in text


def test_a_named_licence_stays_in_the_header(inputs: dict[str, Input], tmp_path: Path) -> None:
    fields = {"license": "other", "license_name": "qwen-research", "license_link": "LICENSE"}
    text = render_card(tmp_path, inputs, f"---\n{yaml.safe_dump(fields)}---\n")
    assert fields.items() <= yaml.safe_load(text.split("---")[1]).items()
    assert "the base model's, qwen-research (no commercial use)." in text


@pytest.mark.parametrize("teacher_licence", ["apache-2.0", "[mit, apache-2.0]", ""])
def test_a_student_of_a_student_keeps_the_restriction_of_the_text(
    inputs: dict[str, Input], tmp_path: Path, teacher_licence: str
) -> None:
    """The header of the first student's card must name the licence of the training text."""
    teacher_card = f"---\nlicense: {teacher_licence}\n---\n"
    render_card(tmp_path, inputs, teacher_card)
    assert not forbids_commercial_use(known_licence(str(tmp_path)))
    [source] = inputs["data"].manifest.metrics["sources"]
    inputs["data"].manifest.metrics["origins"] = {source: {"licence": "CC BY-NC 4.0"}}
    text = render_card(tmp_path, inputs, teacher_card)
    header = yaml.safe_load(text.split("---")[1])
    assert header["license"] == "other"
    assert re.fullmatch("[a-z0-9.-]+", header["license_name"])
    licence = known_licence(str(tmp_path))
    assert teacher_licence.strip("[]").replace(", ", "-") in licence
    assert forbids_commercial_use(licence)


def test_tokenized_text_is_not_called_disjoint(inputs: dict[str, Input], tmp_path: Path) -> None:
    claim = "no document in\ncommon with training"
    assert claim in render_card(tmp_path, inputs)
    inputs["data"].manifest.metrics |= {"sources": ["/data/corpus"], "sample": "Once upon"}
    text = render_card(tmp_path, inputs)
    assert claim not in text
    assert "`corpus`. Licence: not recorded. Its duplicates are not removed" in text


def test_text_that_does_not_exclude_the_evaluated_text_is_not_called_disjoint(
    inputs: dict[str, Input], tmp_path: Path
) -> None:
    data = inputs["data"].manifest
    for held_out, is_disjoint in (({}, False), ({"held_out": data.fingerprint}, True)):
        earlier = {"prepare_long_data": replace(data, fingerprint="other", inputs=held_out)}
        write_card(tmp_path, TEACHER, RECIPE, inputs, earlier)
        claim = "no document in\ncommon with training"
        assert (claim in (tmp_path / "README.md").read_text()) == is_disjoint


def test_the_card_says_how_the_model_was_made(inputs: dict[str, Input], tmp_path: Path) -> None:
    def card(**stages: Manifest) -> str:
        write_card(tmp_path, TEACHER, RECIPE, inputs, stages)
        return (tmp_path / "README.md").read_text()

    pruned, trained = make_inputs(tmp_path / "other")["pruned"].manifest, inputs["checkpoint"]
    text = card(prune=pruned)
    for line in ("layers: named in the settings", "ModelOpt's Minitron", "distilled with NeMo"):
        assert line in text
    pruned.config["drop_layers"] = []
    pruned.architecture = {**TEACHER_SHAPE.as_dict(), "num_layers": 24}
    trained.manifest.config["kd_weight"] = 0.0
    text = card(prune=pruned)
    assert "layers: by this repository's measurement" in text
    assert "without a teacher" in text
    assert not re.search("Minitron|distilled with|least squares|fine-tuning|Healing", text)
    trained.manifest.config["kd_weight"] = 1.0
    pruned.config["layer_importance"] = "block_influence"
    healed = replace(pruned, stage="heal", metrics=asdict(RESULTS["heal"]))
    inputs["healed"] = replace(trained, manifest=healed)
    corrected = replace(pruned, stage="correct_teacher")
    text = card(prune=pruned, correct_teacher=corrected)
    for line in ("by block influence", "least squares", "fine-tuning", "Healing and distillation"):
        assert line in text


@pytest.mark.parametrize(
    ("teacher", "base_model"),
    [
        ("some/Model", "some/Model"),
        ("some/Model@0123abc", "some/Model"),
        ("/models/private/llama", None),
        ("pypi://a/0.1/b/Small.Q4_1.gguf#sha256=bcc8", None),
    ],
)
def test_base_model_is_the_id_of_a_hub_model(
    inputs: dict[str, Input], tmp_path: Path, teacher: str, base_model: str | None
) -> None:
    write_card(tmp_path, teacher, RECIPE, inputs, {})
    text = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1]).get("base_model") == base_model
    assert "/models/private" not in text


def test_the_card_lists_the_experts_of_an_moe(inputs: dict[str, Input], tmp_path: Path) -> None:
    sizes = {"num_moe_experts": 6, "moe_router_topk": 2, "moe_ffn_hidden_size": 96}
    for name, experts in (("checkpoint", 6), ("teacher", 8)):
        inputs[name].manifest.architecture = {
            **STUDENT.as_dict(),
            **sizes,
            "num_moe_experts": experts,
        }
    text = render_card(tmp_path, inputs)
    assert "feed-forward | experts | expert feed-forward | heads" in text
    assert "| this model | 24 | 512 | 1152 | 6 | 96 | 9 | 3 | 64 | 49152 |" in text
    assert "| teacher | 24 | 512 | 1152 | 8 | 96 | 9 |" in text


def test_results_kept_despite_changes_are_listed(inputs: dict[str, Input], tmp_path: Path) -> None:
    assert "was kept" not in render_card(tmp_path, inputs)
    inputs["checkpoint"].manifest.accepted = Acceptance("f", ["its code changed"])
    inputs["checkpoint"] = replace(inputs["checkpoint"], directory=tmp_path / "my_distill")
    assert "- The result of `my_distill` was kept although" in render_card(tmp_path, inputs)
    earlier = {
        "my_score": replace(inputs["data"].manifest, accepted=Acceptance("f", ["n changed"]))
    }
    write_card(tmp_path, TEACHER, RECIPE, inputs, earlier)
    assert "- The result of `my_score` was kept" in (tmp_path / "README.md").read_text()


def test_folders_of_local_files_stay_private(inputs: dict[str, Input], tmp_path: Path) -> None:
    private = "/home/someone/private/my.jsonl"
    inputs["data"].manifest.metrics["sources"] = [
        f"{private}#name=x",
        f"teacher://chat#prompts={private}",
        "pypi://p/1/[12]*.txt#sha256=0",
    ]
    text = render_card(tmp_path, inputs)
    assert "`my.jsonl`. Licence: not recorded." in text
    assert "`teacher://chat`." in text
    assert "[12]*.txt" in text
    assert "/home" not in text


def test_names_cannot_add_markup_to_the_card(inputs: dict[str, Input], tmp_path: Path) -> None:
    """Tries names of models, recipes, sources, tasks, metrics and licences."""
    nasty = "x`|<script>alert(1)</script>\n---\n# Title\n[a](javascript:b)![c](d)"
    inputs["data"].manifest.metrics["sources"] = [f"hf://{nasty}:train", nasty]
    tasks = inputs["tasks"].manifest.metrics["tasks"]
    inputs["tasks"].manifest.metrics["tasks"] = {nasty: {**tasks["sciq"], "metric": nasty}}
    (tmp_path / "README.md").write_text("---\nlicense: '\"a\":b'\n---\n")
    write_card(tmp_path, nasty, nasty, inputs, {})
    _, header, body = (tmp_path / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    fields = yaml.safe_load(header)
    assert "base_model" not in fields, "only the id of a hub model is valid"
    assert fields["license"] == '"a":b'
    assert "<" not in body
    assert "](" not in body
    assert body.count("\n# ") == 1
    # Each inline code span is closed on its line.
    assert not [line for line in body.splitlines() if line.replace("```", "").count("`") % 2]
    rows = [line for line in body.splitlines() if line.startswith("| x script")]
    assert [row.count("|") for row in rows] == [7]  # six cells: the name has added none


@pytest.mark.parametrize(
    ("teacher", "name"),
    [
        ("meta-llama/Llama-3.2-1B", "Llama-3.2-1B"),
        ("/models/my_llama/", "my_llama"),
        ("pypi://a/0.1/b/Small.Q4_1.gguf#sha256=bcc8", "Small.Q4_1"),
    ],
)
def test_a_card_is_named_after_teacher_and_recipe(
    inputs: dict[str, Input], tmp_path: Path, teacher: str, name: str
) -> None:
    write_card(tmp_path, teacher, RECIPE, inputs, {})
    assert f"# {name}-llama_width_prune\n" in (tmp_path / "README.md").read_text()


HF_SERVERS = ["vllm serve export_hf/artifact", "trtllm-serve export_hf/artifact"]


@pytest.fixture
def run_inputs(tmp_path: Path) -> dict[str, Input]:
    return {**make_inputs(tmp_path / "a"), **make_optional_inputs(tmp_path / "a")}


def test_each_artifact_has_commands_that_serve_it(run_inputs: dict[str, Input]) -> None:
    hf_servers = list(run_servers({"exported": run_inputs["exported"]}))
    assert [server.command for server in hf_servers] == HF_SERVERS
    assert not any(server.tested for server in hf_servers)
    openvino, llama, *rest = run_servers(run_inputs)
    assert 'LLMPipeline("engine/artifact", "CPU")' in shlex.split(openvino.command)[2]
    assert openvino.tested
    assert llama.command == "llama-server -m gguf/artifact/model.gguf"
    assert rest == hf_servers


@pytest.mark.parametrize(
    ("family", "hidden_size", "is_loaded"),
    [("Qwen2", 512, False), ("Qwen2", 576, True), ("Qwen3", 512, True)],
)
def test_vllm_is_listed_if_it_supports_the_shape(
    run_inputs: dict[str, Input],
    inputs: dict[str, Input],
    tmp_path: Path,
    family: str,
    hidden_size: int,
    is_loaded: bool,
) -> None:
    shape = replace(STUDENT, hf_architecture=f"{family}ForCausalLM", hidden_size=hidden_size)
    exported = run_inputs["exported"]
    for item in (exported, inputs["checkpoint"]):
        item.manifest.architecture = shape.as_dict()
    servers = {server.server for server in run_servers({"exported": exported})}
    assert servers == {"TensorRT-LLM"} | ({"vLLM"} if is_loaded else set())
    assert ("vllm serve" in render_card(tmp_path, inputs)) == is_loaded


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("tensorrt_llm", " --backend tensorrt --tokenizer export_hf/artifact"),
        (
            "tensorrt_llm_pytorch",
            " --tp_size 2 --extra_llm_api_options engine/artifact/llm_options.yaml",
        ),
    ],
)
def test_tensorrt_llm_engines_are_served_by_trtllm_serve(
    run_inputs: dict[str, Input], backend: str, options: str
) -> None:
    engine = with_result(run_inputs["engine"], replace(RESULTS["build_engine"], backend=backend))
    engine.manifest.config["tensor_parallel_size"] = 2
    first, *_ = run_servers({"exported": run_inputs["exported"], "engine": engine})
    assert first.command == f"trtllm-serve engine/artifact{options}"


def test_commands_have_the_full_path_of_an_artifact_of_another_run(
    run_inputs: dict[str, Input], tmp_path: Path
) -> None:
    other = replace(run_inputs["engine"], directory=tmp_path / "an other" / "engine")
    first, *_ = run_servers({**run_inputs, "engine": other})
    assert str(tmp_path / "an other" / "engine" / "artifact") in shlex.split(first.command)[2]


@pytest.mark.parametrize(
    ("shape", "llama_cpp_converts"),
    [
        (STUDENT, True),
        (replace(STUDENT, hf_architecture="Qwen3MoeForCausalLM"), True),
        (replace(STUDENT, hf_architecture="Qwen2ForCausalLM", hidden_size=576), True),
        (replace(STUDENT, hf_architecture="Qwen2ForCausalLM"), False),
    ],
)
def test_llama_cpp_is_listed_if_its_converter_supports_the_shape(
    shape: Architecture, llama_cpp_converts: bool
) -> None:
    """The converter supports fewer shapes than the GGUF export of this repository."""
    export, openvino, *llama = (server.command for server in conversion_servers("a b", shape))
    assert export.startswith("optimum-cli export openvino --model 'a b' --task text-generation")
    assert 'LLMPipeline("openvino", "CPU")' in shlex.split(openvino)[2]
    commands = [
        "python llama.cpp/convert_hf_to_gguf.py 'a b' --outfile model.gguf",
        "llama-server -m model.gguf",
    ]
    assert llama == (commands if llama_cpp_converts else [])
