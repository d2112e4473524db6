"""Lines that serve what a run made: those for which it has something, and no others."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from nemo_convert.architecture import Architecture
from recipes.core.stage import Input
from recipes.report.serving import converted, served
from tests.support.reports import changed, engine_figures, make_inputs, optional_inputs, rendered

if TYPE_CHECKING:
    from pathlib import Path

FOLDER = ("vllm serve export_hf/artifact", "trtllm-serve export_hf/artifact")


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Input]:
    return {**make_inputs(tmp_path / "run"), **optional_inputs(tmp_path / "run")}


def test_an_exported_folder_alone_has_the_servers_that_read_it(inputs: dict[str, Input]) -> None:
    found = list(served({"exported": inputs["exported"]}))
    assert tuple(one.line for one in found) == FOLDER
    assert not any(one.tested for one in found)


def test_each_artifact_adds_its_line(inputs: dict[str, Input], tmp_path: Path) -> None:
    genai, llama, *rest = served(inputs)
    assert 'LLMPipeline("engine/artifact", "CPU")' in shlex.split(genai.line)[2]
    assert llama.line == "llama-server -m gguf/artifact/model.gguf"
    assert tuple(one.line for one in rest) == FOLDER
    assert "llama-server -m gguf/artifact/model.gguf" in rendered(inputs, tmp_path)


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("tensorrt_llm", " --backend tensorrt --tokenizer export_hf/artifact"),
        ("tensorrt_llm_pytorch", ""),
    ],
)
def test_an_engine_of_tensorrt_llm_is_served_by_it(
    inputs: dict[str, Input], backend: str, options: str
) -> None:
    engine = changed(inputs["engine"], replace(engine_figures(), backend=backend))
    first, *_ = served({"exported": inputs["exported"], "engine": engine})
    assert first.line == f"trtllm-serve engine/artifact{options}"


def test_what_is_elsewhere_is_named_in_full(inputs: dict[str, Input], tmp_path: Path) -> None:
    other = replace(inputs["engine"], directory=tmp_path / "an other" / "engine")
    first, *_ = served({**inputs, "engine": other})
    assert str(tmp_path / "an other" / "engine" / "artifact") in shlex.split(first.line)[2]


@pytest.mark.parametrize(
    ("hf_architecture", "hidden_size", "known"),
    [
        ("LlamaForCausalLM", 512, True),
        ("Qwen3MoeForCausalLM", 512, True),
        ("Qwen2ForCausalLM", 576, True),
        ("Qwen2ForCausalLM", 512, False),
    ],
)
def test_a_folder_is_converted_for_those_that_do_not_read_it(
    inputs: dict[str, Input], hf_architecture: str, hidden_size: int, known: bool
) -> None:
    """But for what llama.cpp's own converter, unlike ours, has no name for."""
    shape = Architecture(**(inputs["exported"].manifest.architecture or {}))
    shape = replace(shape, hf_architecture=hf_architecture, hidden_size=hidden_size)
    made, genai, *llama = (one.line for one in converted("a b", shape))
    assert made.startswith("optimum-cli export openvino --model 'a b' --task text-generation")
    assert 'LLMPipeline("openvino", "CPU")' in shlex.split(genai)[2]
    assert (
        llama
        == [
            "python llama.cpp/convert_hf_to_gguf.py 'a b' --outfile model.gguf",
            "llama-server -m model.gguf",
        ]
        * known
    )
