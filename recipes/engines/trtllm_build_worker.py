"""Builds one engine with TensorRT-LLM's Python API, inside NVIDIA's image.

``tensorrt_llm.build`` starts this module as
``python -m recipes.engines.trtllm_build_worker REQUEST.json``. ``tensorrt_llm.build_request`` makes
the file's content. The calls follow TensorRT-LLM's own ``tensorrt_llm/bench/build/build.py``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(request: dict[str, Any]) -> None:
    """Converts the checkpoint, builds the engine and saves it in ``request["engine_dir"]``."""
    from tensorrt_llm._tensorrt_engine import LLM
    from tensorrt_llm.builder import BuildConfig
    from tensorrt_llm.llmapi.llm_utils import QuantConfig
    from tensorrt_llm.quantization.mode import QuantAlgo

    build_config = BuildConfig(**request["build_config"])
    for name, value in request["plugin_config"].items():
        setattr(build_config.plugin_config, name, value)
    # Maps an argument of QuantConfig, for weights or KV cache, to its algorithm.
    algorithms = {name: QuantAlgo(value) for name, value in request["quant_config"].items()}
    llm = LLM(**request["llm"], build_config=build_config, quant_config=QuantConfig(**algorithms))
    llm.save(request["engine_dir"])
    llm.shutdown()


# With tensor parallelism, MPI's workers import this module again, and must not call ``main``.
if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
