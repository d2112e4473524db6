"""The line that serves what a run has made, for each server that can read it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_convert.architecture import Architecture
from nemo_convert.gguf_file import ARCHITECTURES, FILE, architecture_name
from recipes.core.stage import Input
from recipes.engines.results import EngineResult

GENAI = (
    "import openvino_genai as g; "
    'print(g.LLMPipeline({engine}, "CPU").generate("Hello", max_new_tokens=64))'
)


OPTIONS = "--task text-generation-with-past --weight-format fp16"
"""Of optimum, which finds out no task by itself, and takes 8 bits for large models."""


@dataclass(frozen=True)
class Served:
    """A server, what it is started with, and whether a test runs that line."""

    server: str
    line: str
    tested: bool = False


def servers(folder: str) -> Iterator[Served]:
    """Those that read a Hugging Face folder."""
    yield Served("vLLM", f"vllm serve {shlex.quote(folder)}")
    yield Served("TensorRT-LLM", f"trtllm-serve {shlex.quote(folder)}")


def converted(folder: str, shape: Architecture) -> Iterator[Served]:
    """Those that read what a converter makes of such a folder: its own line, then the server's."""
    place = shlex.quote(folder)
    made = f"optimum-cli export openvino --model {place} {OPTIONS} openvino"
    yield Served("OpenVINO GenAI", made, tested=True)
    yield _genai("openvino")
    known = ARCHITECTURES.get(shape.hf_architecture)
    if known is None or known == architecture_name(shape):  # its converter gives no other name
        made = f"python llama.cpp/convert_hf_to_gguf.py {place} --outfile {FILE}"
        yield Served("llama.cpp", made)
        yield _llama_server(FILE)


def served(inputs: Mapping[str, Input]) -> Iterator[Served]:
    """All for which the inputs of a report have something, from within the run's directory."""
    exported = inputs["exported"]
    run_dir = exported.directory.parent
    places = {name: _place(item.artifact, run_dir) for name, item in inputs.items()}
    if "engine" in inputs:
        engine, backend = places["engine"], inputs["engine"].manifest.result(EngineResult).backend
        if backend == "openvino":
            yield _genai(engine)
        else:
            of_engine = ("--backend", "tensorrt", "--tokenizer", places["exported"])
            options = of_engine if backend == "tensorrt_llm" else ()
            yield Served("TensorRT-LLM", shlex.join(["trtllm-serve", engine, *options]))
    if "gguf" in inputs:
        yield _llama_server(f"{places['gguf']}/{FILE}")
    yield from servers(places["exported"])


def _genai(engine: str) -> Served:
    code = GENAI.format(engine=json.dumps(engine))
    return Served("OpenVINO GenAI", f"python -c {shlex.quote(code)}", tested=True)


def _llama_server(file: str) -> Served:
    return Served("llama.cpp", shlex.join(["llama-server", "-m", file]))


def _place(artifact: Path, run_dir: Path) -> str:
    return str(artifact.relative_to(run_dir) if artifact.is_relative_to(run_dir) else artifact)
