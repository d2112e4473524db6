"""Lists commands that serve a run's models, for each server that can load them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nemo_convert.architecture import Architecture
from nemo_convert.gguf_file import ARCHITECTURES, FILE, architecture_name
from recipes.core.stage import Input
from recipes.engines.openvino import SETTINGS
from recipes.engines.results import EngineResult
from recipes.engines.server import trtllm_command

GENAI_CODE = (
    "import json, openvino_genai as g; "
    'print(g.LLMPipeline({engine}, "CPU"{properties}).generate("Hello", max_new_tokens=64))'
)
OPTIMUM_OPTIONS = "--task text-generation-with-past --weight-format fp16"
"""Optimum does not detect the task, and by default writes large models in 8 bits."""


@dataclass(frozen=True)
class ServerCommand:
    """A server, and a command that starts the server or converts a model for it."""

    server: str
    command: str
    tested: bool = False
    """Whether a test of this repository runs the command."""


def folder_servers(folder: str, shape: Architecture | None) -> Iterator[ServerCommand]:
    """Yields commands of servers that load a Hugging Face folder directly.

    ``shape`` is ``None`` if the model's shape is unknown. Then vLLM is assumed to support it.
    """
    if shape is None or _is_loaded_by_vllm(shape):
        yield ServerCommand("vLLM", f"vllm serve {shlex.quote(folder)}")
    yield ServerCommand("TensorRT-LLM", f"trtllm-serve {shlex.quote(folder)}")


def _is_loaded_by_vllm(shape: Architecture) -> bool:
    """Whether vLLM supports the shape. For Qwen2, heads * head size must be the hidden size."""
    query_width = shape.num_attention_heads * shape.kv_channels
    return shape.hf_architecture != "Qwen2ForCausalLM" or query_width == shape.hidden_size


def conversion_servers(folder: str, shape: Architecture) -> Iterator[ServerCommand]:
    """Yields two commands for each server that needs another format: convert, then serve."""
    path = shlex.quote(folder)
    export = f"optimum-cli export openvino --model {path} {OPTIMUM_OPTIONS} openvino"
    yield ServerCommand("OpenVINO GenAI", export, tested=True)
    yield _genai("openvino")
    # llama.cpp's converter always writes a family's usual architecture. Some width-pruned shapes
    # need another architecture, so there is no command for them. Other families are not checked.
    usual_name = ARCHITECTURES.get(shape.hf_architecture)  # ``None`` for other families
    if usual_name is None or usual_name == architecture_name(shape):
        convert = f"python llama.cpp/convert_hf_to_gguf.py {path} --outfile {FILE}"
        yield ServerCommand("llama.cpp", convert)
        yield _llama_server(FILE)


def run_servers(inputs: Mapping[str, Input]) -> Iterator[ServerCommand]:
    """Yields commands for the inputs of a report, to be run in the run's directory.

    Paths of inputs from other runs are absolute; other paths are relative to the run's directory.
    """
    exported = inputs["exported"]
    run_dir = exported.directory.parent
    artifacts = {name: item.artifact for name, item in inputs.items()}
    paths = {
        name: str(path.relative_to(run_dir) if path.is_relative_to(run_dir) else path)
        for name, path in artifacts.items()
    }
    if "engine" in inputs:
        engine, manifest = paths["engine"], inputs["engine"].manifest
        backend = manifest.result(EngineResult).backend
        if backend == "openvino":
            yield _genai(engine, f"{engine}/{SETTINGS}")
        else:
            ranks = manifest.config["tensor_parallel_size"]
            command = trtllm_command(engine, backend, paths["exported"], ranks)
            yield ServerCommand("TensorRT-LLM", shlex.join(command))
    if "gguf" in inputs:
        yield _llama_server(f"{paths['gguf']}/{FILE}")
    architecture = exported.manifest.architecture
    shape = Architecture(**architecture) if architecture else None
    yield from folder_servers(paths["exported"], shape)


def _genai(engine: str, settings: str | None = None) -> ServerCommand:
    """Returns the command that loads the folder ``engine`` in OpenVINO GenAI and generates text.

    ``settings`` is a file with the OpenVINO properties of the run's measurement. Without them,
    OpenVINO may compute in another precision.
    """
    # A JSON string is a Python literal, too.
    properties = f', **json.load(open({json.dumps(settings)}))["properties"]' if settings else ""
    code = GENAI_CODE.format(engine=json.dumps(engine), properties=properties)
    return ServerCommand("OpenVINO GenAI", f"python -c {shlex.quote(code)}", tested=True)


def _llama_server(file: str) -> ServerCommand:
    """Returns the command that serves a GGUF file."""
    return ServerCommand("llama.cpp", shlex.join(["llama-server", "-m", file]))
