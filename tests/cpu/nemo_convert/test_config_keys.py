"""``config_keys`` lists every key that transformers 4 or 5 writes for a supported family."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from nemo_convert.config_keys import unknown_keys
from nemo_convert.hf_config import as_transformers_4, read_architecture, rope_theta
from tests.support.models import FAMILIES
from tests.support.transformers_5 import transformers_5

# Prints a JSON object: for each family, a config with all keys, as older programs write it. Newer
# ones leave out keys with default values.
WRITE_CONFIGS = """
import json, sys
from transformers import AutoConfig

families = json.loads(sys.argv[1])
print(json.dumps({
    name: AutoConfig.for_model(name, rope_theta=5000.0, **settings).to_dict()
    for name, settings in families.items()
}))
"""
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


@pytest.fixture(scope="module", params=[4, 5])
def configs(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """Returns complete configs by family, as transformers 4 or 5 writes them."""
    env = dict(os.environ)
    if request.param == 5:
        env["PYTHONPATH"] = str(transformers_5())
    command = [sys.executable, "-c", WRITE_CONFIGS, json.dumps(FAMILIES)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_a_config_is_listed(configs: dict[str, dict[str, Any]], family: str) -> None:
    config_json = {**configs[family], "architectures": [ARCHITECTURES[family]]}
    config = as_transformers_4(config_json, family)
    assert list(unknown_keys(config)) == []
    assert rope_theta(config) == 5000.0  # set by WRITE_CONFIGS
    architecture = read_architecture(config_json, family)
    assert architecture.num_layers == configs[family]["num_hidden_layers"]
    assert architecture.num_moe_experts == FAMILIES[family].get("num_experts", 0)
