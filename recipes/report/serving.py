"""The line that serves what a run has made, for each server that can read it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_convert.gguf_file import FILE
from recipes.core.stage import Input
from recipes.engines.results import EngineResult

GENAI = (
    "import openvino_genai as g; "
    'print(g.LLMPipeline({engine}, "CPU").generate("Hello", max_new_tokens=64))'
)


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


def served(inputs: Mapping[str, Input]) -> Iterator[Served]:
    """All for which the inputs of a report have something, from within the run's directory."""
    exported = inputs["exported"]
    run_dir = exported.directory.parent
    places = {name: _place(item.artifact, run_dir) for name, item in inputs.items()}
    if "engine" in inputs:
        engine, backend = places["engine"], inputs["engine"].manifest.result(EngineResult).backend
        if backend == "openvino":
            code = GENAI.format(engine=json.dumps(engine))
            yield Served("OpenVINO GenAI", f"python -c {shlex.quote(code)}", tested=True)
        else:
            of_engine = ("--backend", "tensorrt", "--tokenizer", places["exported"])
            options = of_engine if backend == "tensorrt_llm" else ()
            yield Served("TensorRT-LLM", shlex.join(["trtllm-serve", engine, *options]))
    if "gguf" in inputs:
        line = shlex.join(["llama-server", "-m", f"{places['gguf']}/{FILE}"])
        yield Served("llama.cpp", line)
    yield from servers(places["exported"])


def _place(artifact: Path, run_dir: Path) -> str:
    return str(artifact.relative_to(run_dir) if artifact.is_relative_to(run_dir) else artifact)
