"""Model cards, and commands that serve a run's models, for the results in ``tests.support``."""

from __future__ import annotations

import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

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
Inputs = dict[str, Input]
"""Maps the names of a stage's inputs to the inputs."""


@pytest.fixture
def run_inputs(tmp_path: Path) -> Inputs:
    """The inputs of ``report`` in a run that has all optional stages."""
    return {**make_inputs(tmp_path / "run"), **make_optional_inputs(tmp_path / "run")}


@pytest.fixture
def inputs(run_inputs: Inputs) -> Inputs:
    """The inputs of ``export_hf``. The evaluation used the held-out split of ``data``."""
    run_inputs["evaluation"].manifest.inputs["data"] = run_inputs["data"].manifest.fingerprint
    common_names = ("evaluation", "teacher", "data", "tasks")  # ``report`` has the same names
    common = {name: run_inputs[name] for name in common_names}
    return {"checkpoint": run_inputs["distilled"], **common}


def render_card(
    folder: Path, inputs: Inputs, old_card: str = "", teacher: str = TEACHER, **upstream: Manifest
) -> str:
    """Writes the teacher's card, replaces it by the student's card, and returns the new card."""
    (folder / "README.md").write_text(old_card)
    write_card(folder, teacher, RECIPE, inputs, upstream)
    return (folder / "README.md").read_text(encoding="utf-8")


def header_of(card: str) -> dict[str, Any]:
    """Returns the fields of a card's YAML header."""
    fields: dict[str, Any] = yaml.safe_load(card.split("---")[1])
    return fields


def test_every_input_adds_lines_to_the_card(inputs: Inputs, tmp_path: Path) -> None:
    inputs["tasks"].manifest.config["limit"] = 100
    text = render_card(tmp_path, inputs, "---\nlicense: apache-2.0\n---\n# Teacher")
    header = header_of(text)
    assert header["license"] == "apache-2.0"
    [index] = header["model-index"]
    # Maps the name of a dataset and of a metric to the metric's value.
    values = {
        (result["dataset"]["name"], metric["type"]): metric["value"]
        for result in index["results"]
        for metric in result["metrics"]
    }
    assert values["sciq", "acc"] == 0.79
    datasets = {result["dataset"]["name"]: result["dataset"] for result in index["results"]}
    assert datasets["sciq"]["split"] == "validation"
    assert datasets["sciq"]["args"] == {"num_fewshot": 0, "limit": 100}
    assert {metric for _, metric in values} == {"perplexity", "kl_to_teacher", "acc", "acc_norm"}
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


def test_each_text_has_its_own_results_in_the_header(inputs: Inputs, tmp_path: Path) -> None:
    """``huggingface_hub`` merges results that have the same dataset type and configuration."""
    names = ["wikipedia", "code", "mail"]
    quality = TextQuality(4.0, 0.05, 54.6, 0.4, 0.6)  # the same for all three models
    source_quality = SourceQuality(quality, quality, quality, 20, 5120, 5100, None)
    sources = dict.fromkeys(names, source_quality)
    evaluation = replace(RESULTS["evaluate"], sources=sources)
    inputs["evaluation"] = with_result(inputs["evaluation"], evaluation)
    render_card(tmp_path, inputs)
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    text_names = [result.dataset_name for result in results if result.dataset_type == "text"]
    # Each text has two results: perplexity and KL to the teacher.
    assert text_names == [name for name in names for _ in range(2)]


def test_a_card_says_if_distillation_raised_the_loss(inputs: Inputs, tmp_path: Path) -> None:
    inputs["evaluation"].manifest.metrics["recovered"] = -0.4  # negative: the loss increased
    text = render_card(tmp_path, inputs)
    assert "-40%" not in text
    assert "raised" in text


@pytest.mark.parametrize(("hidden_size", "needs_version_4"), [(512, True), (576, False)])
def test_the_card_of_a_model_that_transformers_5_refuses_names_version_4(
    inputs: Inputs, tmp_path: Path, hidden_size: int, needs_version_4: bool
) -> None:
    """transformers 5 refuses 512, which is not a multiple of the student's 9 heads."""
    shape = replace(STUDENT, hidden_size=hidden_size)
    inputs["checkpoint"].manifest.architecture = shape.as_dict()
    assert ('pip install "transformers==4.*"' in render_card(tmp_path, inputs)) == needs_version_4


def test_optional_inputs_may_be_missing(inputs: Inputs, tmp_path: Path) -> None:
    required = {name: inputs[name] for name in (*export_hf.STAGE.inputs, "evaluation")}
    required["evaluation"].manifest.metrics["recovered"] = None
    text = render_card(tmp_path, required)
    assert "| this model | 24 |" in text
    assert "was not found in its folder" in text  # the licence: the teacher's card is empty
    for absent in ("| teacher | 30 |", "## Tasks", "Text:", "Distillation recovered", "None"):
        assert absent not in text


def test_licences_of_weights_and_text_are_stated_separately(inputs: Inputs, tmp_path: Path) -> None:
    teacher_card = "---\nlicense: apache-2.0\n---\n"
    text = render_card(tmp_path, inputs, teacher_card)
    assert "Licence of the weights: the base model's, apache-2.0. Made with" in text
    [source] = inputs["data"].manifest.metrics["sources"]
    inputs["data"].manifest.metrics["origins"] = {source: {"licence": "CC-BY-NC-4.0"}}
    text = render_card(tmp_path, inputs, teacher_card)
    assert "Licence: CC-BY-NC-4.0 (no commercial use).\n" in text
    assert "The licence of the training\ntext forbids commercial use: CC-BY-NC-4.0. Made" in text


def test_a_named_licence_stays_in_the_header(inputs: Inputs, tmp_path: Path) -> None:
    fields = {"license": "other", "license_name": "qwen-research", "license_link": "LICENSE"}
    text = render_card(tmp_path, inputs, f"---\n{yaml.safe_dump(fields)}---\n")
    assert fields.items() <= header_of(text).items()
    assert "the base model's, qwen-research (no commercial use)." in text


@pytest.mark.parametrize("teacher_licence", ["apache-2.0", "[mit, apache-2.0]", ""])
def test_a_student_of_a_student_keeps_the_restriction_of_the_text(
    inputs: Inputs, tmp_path: Path, teacher_licence: str
) -> None:
    """A later run reads the restriction from the header of the first student's card."""
    teacher_card = f"---\nlicense: {teacher_licence}\n---\n"
    render_card(tmp_path, inputs, teacher_card)
    assert not forbids_commercial_use(known_licence(str(tmp_path)))
    [source] = inputs["data"].manifest.metrics["sources"]
    inputs["data"].manifest.metrics["origins"] = {source: {"licence": "CC BY-NC 4.0"}}
    text = render_card(tmp_path, inputs, teacher_card)
    header = header_of(text)
    assert header["license"] == "other"
    assert re.fullmatch("[a-z0-9.-]+", header["license_name"])
    licence = known_licence(str(tmp_path))
    # The card joins several licences of the teacher with hyphens.
    assert teacher_licence.strip("[]").replace(", ", "-") in licence
    assert forbids_commercial_use(licence)


def test_only_text_without_the_evaluated_documents_is_called_disjoint(
    inputs: Inputs, tmp_path: Path
) -> None:
    """A second dataset needs the input ``held_out``, which removes the evaluated documents.

    Documents of ``data.prefix``, which has a ``sample``, are not compared with other text.
    """
    data = inputs["data"].manifest
    claim = "no document in\ncommon with training"
    assert claim in render_card(tmp_path, inputs)
    for data_inputs, is_disjoint in (({}, False), ({"held_out": data.fingerprint}, True)):
        second_data = replace(data, fingerprint="other", inputs=data_inputs)
        text = render_card(tmp_path, inputs, prepare_long_data=second_data)
        assert (claim in text) == is_disjoint
    data.metrics |= {"sources": ["/data/corpus"], "sample": "Once upon"}
    text = render_card(tmp_path, inputs)
    assert claim not in text
    assert "`corpus`. Licence: not recorded. Its duplicates are not removed" in text


def test_the_card_says_how_the_model_was_made(
    inputs: Inputs, run_inputs: Inputs, tmp_path: Path
) -> None:
    pruned, trained = run_inputs["pruned"].manifest, inputs["checkpoint"]
    # Layers named in ``drop_layers``, pruned widths and a teacher.
    text = render_card(tmp_path, inputs, prune=pruned)
    for line in ("layers: named in the settings", "ModelOpt's Minitron", "distilled with NeMo"):
        assert line in text
    # Layers chosen by the loss without them, no pruned widths and no teacher.
    pruned.config["drop_layers"] = []
    pruned.architecture = {**TEACHER_SHAPE.as_dict(), "num_layers": 24}
    trained.manifest.config["kd_weight"] = 0.0
    text = render_card(tmp_path, inputs, prune=pruned)
    assert "layers: by this repository's measurement" in text
    assert "without a teacher" in text
    assert not re.search("Minitron|distilled with|least squares|fine-tuning|Healing", text)
    # Block influence, healing, and distillation from a fine-tuned teacher.
    trained.manifest.config["kd_weight"] = 1.0
    pruned.config["layer_importance"] = "block_influence"
    healed = replace(pruned, stage="heal", metrics=asdict(RESULTS["heal"]))
    inputs["healed"] = replace(trained, manifest=healed)
    corrected = replace(pruned, stage="correct_teacher")
    text = render_card(tmp_path, inputs, prune=pruned, correct_teacher=corrected)
    for line in ("by block influence", "least squares", "fine-tuning", "Healing and distillation"):
        assert line in text


@pytest.mark.parametrize(
    ("teacher", "name", "base_model"),
    [
        ("some/Llama-3.2-1B", "Llama-3.2-1B", "some/Llama-3.2-1B"),
        ("some/Model@0123abc", "Model@0123abc", "some/Model"),
        ("/models/private/my_llama/", "my_llama", None),
        ("pypi://a/0.1/b/Small.Q4_1.gguf#sha256=bcc8", "Small.Q4_1", None),
    ],
)
def test_a_card_has_the_name_of_the_teacher_and_the_id_of_a_hub_model(
    inputs: Inputs, tmp_path: Path, teacher: str, name: str, base_model: str | None
) -> None:
    """A local folder and a ``pypi://`` address are not ids, and the hub would refuse the card."""
    text = render_card(tmp_path, inputs, teacher=teacher)
    assert f"# {name}-{RECIPE}\n" in text
    assert header_of(text).get("base_model") == base_model
    assert "/models/private" not in text


def test_the_card_lists_the_experts_of_an_moe(inputs: Inputs, tmp_path: Path) -> None:
    moe = replace(STUDENT, moe_router_topk=2, moe_ffn_hidden_size=96)
    for name, experts in (("checkpoint", 6), ("teacher", 8)):
        inputs[name].manifest.architecture = replace(moe, num_moe_experts=experts).as_dict()
    text = render_card(tmp_path, inputs)
    assert "feed-forward | experts | expert feed-forward | heads" in text
    assert "| this model | 24 | 512 | 1152 | 6 | 96 | 9 | 3 | 64 | 49152 |" in text
    assert "| teacher | 24 | 512 | 1152 | 8 | 96 | 9 |" in text


def test_results_kept_despite_changes_are_listed(inputs: Inputs, tmp_path: Path) -> None:
    """Covers an input of ``export_hf`` and a stage upstream of the inputs."""
    assert "was kept" not in render_card(tmp_path, inputs)
    inputs["checkpoint"].manifest.accepted = Acceptance("f", ["its code changed"])
    inputs["checkpoint"] = replace(inputs["checkpoint"], directory=tmp_path / "my_distill")
    assert "- The result of `my_distill` was kept although" in render_card(tmp_path, inputs)
    upstream = replace(inputs["data"].manifest, accepted=Acceptance("f", ["n changed"]))
    text = render_card(tmp_path, inputs, my_score=upstream)
    assert "- The result of `my_score` was kept" in text


def test_folders_of_local_files_stay_private(inputs: Inputs, tmp_path: Path) -> None:
    """Sources: a local file, texts that the teacher continued from local prompts, and a package."""
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


def test_names_cannot_add_markup_to_the_card(inputs: Inputs, tmp_path: Path) -> None:
    """Tries names of models, recipes, sources, tasks, metrics and licences."""
    nasty = "x`|<script>alert(1)</script>\n---\n# Title\n[a](javascript:b)![c](d)"
    inputs["data"].manifest.metrics["sources"] = [f"hf://{nasty}:train", nasty]
    tasks = inputs["tasks"].manifest.metrics["tasks"]
    inputs["tasks"].manifest.metrics["tasks"] = {nasty: {**tasks["sciq"], "metric": nasty}}
    # A licence with quotation marks and a colon, which YAML must quote.
    (tmp_path / "README.md").write_text("---\nlicense: '\"a\":b'\n---\n")
    write_card(tmp_path, nasty, nasty, inputs, {})
    _, header, body = (tmp_path / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    fields = yaml.safe_load(header)
    assert "base_model" not in fields, "only the id of a hub model is valid"
    assert fields["license"] == '"a":b'
    assert "<" not in body  # no HTML
    assert "](" not in body  # no link
    assert body.count("\n# ") == 1  # only the card's own title
    # Each inline code span is closed on its line. Lines with ``` delimit blocks of code.
    assert not [line for line in body.splitlines() if line.replace("```", "").count("`") % 2]
    task_rows = [line for line in body.splitlines() if line.startswith("| x script")]
    # One task, with six cells between seven bars: the bar in its name adds no cell.
    assert [row.count("|") for row in task_rows] == [7]


HF_SERVERS = ["vllm serve export_hf/artifact", "trtllm-serve export_hf/artifact"]
"""Commands that serve the exported Hugging Face folder."""


def test_each_artifact_has_commands_that_serve_it(run_inputs: Inputs) -> None:
    hf_servers = list(run_servers({"exported": run_inputs["exported"]}))
    assert [server.command for server in hf_servers] == HF_SERVERS
    assert not any(server.tested for server in hf_servers)
    openvino, llama, *other_servers = run_servers(run_inputs)
    # The command is ``python -c CODE``.
    properties = 'json.load(open("engine/artifact/engine.json"))["properties"]'
    engine_code = f'LLMPipeline("engine/artifact", "CPU", **{properties})'
    assert engine_code in shlex.split(openvino.command)[2]
    assert openvino.tested
    assert llama.command == "llama-server -m gguf/artifact/model.gguf"
    assert other_servers == hf_servers


@pytest.mark.parametrize(
    ("family", "hidden", "is_listed"),
    [("Qwen2", 512, False), ("Qwen2", 576, True), ("Qwen3", 512, True)],
)
def test_vllm_is_listed_if_it_supports_the_shape(
    run_inputs: Inputs, inputs: Inputs, tmp_path: Path, family: str, hidden: int, is_listed: bool
) -> None:
    """The student has 9 heads of size 64. vLLM's Qwen2 then requires the hidden size 576."""
    shape = replace(STUDENT, hf_architecture=f"{family}ForCausalLM", hidden_size=hidden)
    exported = run_inputs["exported"]
    for item in (exported, inputs["checkpoint"]):
        item.manifest.architecture = shape.as_dict()
    servers = {server.server for server in run_servers({"exported": exported})}
    assert servers == {"TensorRT-LLM"} | ({"vLLM"} if is_listed else set())
    assert ("vllm serve" in render_card(tmp_path, inputs)) == is_listed


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
    run_inputs: Inputs, backend: str, options: str
) -> None:
    engine = with_result(run_inputs["engine"], replace(RESULTS["build_engine"], backend=backend))
    engine.manifest.config["tensor_parallel_size"] = 2
    first, *_ = run_servers({"exported": run_inputs["exported"], "engine": engine})
    assert first.command == f"trtllm-serve engine/artifact{options}"


def test_commands_have_the_full_path_of_an_artifact_of_another_run(
    run_inputs: Inputs, tmp_path: Path
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
    """llama.cpp's Qwen2 requires the hidden size 9 heads * 64 = 576. The student has 512."""
    export, openvino, *llama_cpp = (server.command for server in conversion_servers("a b", shape))
    assert export.startswith("optimum-cli export openvino --model 'a b' --task text-generation")
    assert 'LLMPipeline("openvino", "CPU")' in shlex.split(openvino)[2]
    commands = [
        "python llama.cpp/convert_hf_to_gguf.py 'a b' --outfile model.gguf",
        "llama-server -m model.gguf",
    ]
    assert llama_cpp == (commands if llama_cpp_converts else [])
