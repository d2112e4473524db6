"""Command lines that serve a run's results."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from nemo_convert.architecture import Architecture
from recipes.core.stage import Input
from recipes.report.serving import converted, served
from tests.support.reports import changed, make_inputs, optional_inputs
from tests.support.results import RESULTS, STUDENT

if TYPE_CHECKING:
    from pathlib import Path

FOLDER = ["vllm serve export_hf/artifact", "trtllm-serve export_hf/artifact"]


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Input]:
    return {**make_inputs(tmp_path / "run"), **optional_inputs(tmp_path / "run")}


def test_each_artifact_adds_its_server(inputs: dict[str, Input]) -> None:
    folder = list(served({"exported": inputs["exported"]}))
    assert [one.line for one in folder] == FOLDER
    assert not any(one.tested for one in folder)
    openvino, llama, *rest = served(inputs)
    assert 'LLMPipeline("engine/artifact", "CPU")' in shlex.split(openvino.line)[2]
    assert openvino.tested
    assert llama.line == "llama-server -m gguf/artifact/model.gguf"
    assert rest == folder


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("tensorrt_llm", " --backend tensorrt --tokenizer export_hf/artifact"),
        ("tensorrt_llm_pytorch", ""),
    ],
)
def test_tensorrt_llm_serves_its_engines(
    inputs: dict[str, Input], backend: str, options: str
) -> None:
    engine = changed(inputs["engine"], replace(RESULTS["build_engine"], backend=backend))
    first, *_ = served({"exported": inputs["exported"], "engine": engine})
    assert first.line == f"trtllm-serve engine/artifact{options}"


def test_an_artifact_of_another_run_has_its_full_path(
    inputs: dict[str, Input], tmp_path: Path
) -> None:
    other = replace(inputs["engine"], directory=tmp_path / "an other" / "engine")
    first, *_ = served({**inputs, "engine": other})
    assert str(tmp_path / "an other" / "engine" / "artifact") in shlex.split(first.line)[2]


@pytest.mark.parametrize(
    ("shape", "llama_cpp_converts"),
    [
        (STUDENT, True),
        (replace(STUDENT, hf_architecture="Qwen3MoeForCausalLM"), True),
        (replace(STUDENT, hf_architecture="Qwen2ForCausalLM", hidden_size=576), True),
        (replace(STUDENT, hf_architecture="Qwen2ForCausalLM"), False),
    ],
)
def test_conversions_of_a_folder(shape: Architecture, llama_cpp_converts: bool) -> None:
    """llama.cpp's converter cannot write every architecture that the GGUF export writes."""
    export, openvino, *llama = (one.line for one in converted("a b", shape))
    assert export.startswith("optimum-cli export openvino --model 'a b' --task text-generation")
    assert 'LLMPipeline("openvino", "CPU")' in shlex.split(openvino)[2]
    lines = [
        "python llama.cpp/convert_hf_to_gguf.py 'a b' --outfile model.gguf",
        "llama-server -m model.gguf",
    ]
    assert llama == (lines if llama_cpp_converts else [])
