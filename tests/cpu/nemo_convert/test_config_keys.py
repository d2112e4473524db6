"""``config_keys`` lists every key that transformers 4 or 5 writes for a supported family."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS

from nemo_convert.config_keys import unknown_keys
from nemo_convert.hf_config import as_transformers_4, read_architecture, rope_theta
from recipes.core.files import read_json
from tests.support.models import FAMILIES
from tests.support.transformers_5 import run_with_transformers_5

# Writes a JSON object: for each family, a config with all keys, as older programs write it. Newer
# ones leave out keys with default values.
WRITE_CONFIGS = """
import json, sys
from transformers import AutoConfig

families = json.loads(sys.argv[1])
with open(sys.argv[2], "w") as file:
    json.dump({
        name: AutoConfig.for_model(name, rope_theta=5000.0, **settings).to_dict()
        for name, settings in families.items()
    }, file)
"""


@pytest.fixture(scope="module", params=[4, 5])
def configs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Returns complete configs by family, as transformers 4 or 5 writes them."""
    file, families = tmp_path_factory.mktemp("configs") / "configs.json", json.dumps(FAMILIES)
    if request.param == 5:
        run_with_transformers_5(WRITE_CONFIGS, families, file)
    else:
        command = [sys.executable, "-c", WRITE_CONFIGS, families, file]
        subprocess.run(command, check=True)
    return read_json(file)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_a_config_is_listed(configs: dict[str, dict[str, Any]], family: str) -> None:
    config_json = {**configs[family], "architectures": [CAUSAL_LMS[family]]}
    config = as_transformers_4(config_json, family)
    assert list(unknown_keys(config)) == []
    assert rope_theta(config) == 5000.0  # set by WRITE_CONFIGS
    architecture = read_architecture(config_json, family)
    assert architecture.num_layers == configs[family]["num_hidden_layers"]
    assert architecture.num_moe_experts == FAMILIES[family].get("num_experts", 0)
