"""Command lines that serve a run's results, for each server that can read them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nemo_convert.architecture import Architecture
from nemo_convert.gguf_file import ARCHITECTURES, FILE, architecture_name
from recipes.core.stage import Input
from recipes.engines.results import EngineResult

GENAI = (
    "import openvino_genai as g; "
    'print(g.LLMPipeline({engine}, "CPU").generate("Hello", max_new_tokens=64))'
)
OPTIMUM_OPTIONS = "--task text-generation-with-past --weight-format fp16"
"""Optimum does not detect the task, and uses 8 bits for large models by default."""


@dataclass(frozen=True)
class Served:
    """A server and the command line that starts it."""

    server: str
    line: str
    tested: bool = False
    """Whether a test of this repository runs the line."""


def servers(folder: str) -> Iterator[Served]:
    """Yields the servers that read a Hugging Face folder."""
    yield Served("vLLM", f"vllm serve {shlex.quote(folder)}")
    yield Served("TensorRT-LLM", f"trtllm-serve {shlex.quote(folder)}")


def converted(folder: str, shape: Architecture) -> Iterator[Served]:
    """Yields servers that need a conversion: a line that converts, then one that serves."""
    path = shlex.quote(folder)
    export = f"optimum-cli export openvino --model {path} {OPTIMUM_OPTIONS} openvino"
    yield Served("OpenVINO GenAI", export, tested=True)
    yield _genai("openvino")
    usual_name = ARCHITECTURES.get(shape.hf_architecture)
    # llama.cpp's own converter always writes a family's usual name.
    if usual_name is None or usual_name == architecture_name(shape):
        convert = f"python llama.cpp/convert_hf_to_gguf.py {path} --outfile {FILE}"
        yield Served("llama.cpp", convert)
        yield _llama_server(FILE)


def served(inputs: Mapping[str, Input]) -> Iterator[Served]:
    """Yields all servers of the inputs of a report; paths are relative to the run's directory."""
    run_dir = inputs["exported"].directory.parent
    paths = {
        name: str(path.relative_to(run_dir) if path.is_relative_to(run_dir) else path)
        for name, path in ((name, item.artifact) for name, item in inputs.items())
    }
    if "engine" in inputs:
        engine, backend = paths["engine"], inputs["engine"].manifest.result(EngineResult).backend
        if backend == "openvino":
            yield _genai(engine)
        else:
            words = ["trtllm-serve", engine]
            if backend == "tensorrt_llm":
                words += ["--backend", "tensorrt", "--tokenizer", paths["exported"]]
            yield Served("TensorRT-LLM", shlex.join(words))
    if "gguf" in inputs:
        yield _llama_server(f"{paths['gguf']}/{FILE}")
    yield from servers(paths["exported"])


def _genai(engine: str) -> Served:
    code = GENAI.format(engine=json.dumps(engine))
    return Served("OpenVINO GenAI", f"python -c {shlex.quote(code)}", tested=True)


def _llama_server(file: str) -> Served:
    return Served("llama.cpp", shlex.join(["llama-server", "-m", file]))
