"""Installs and runs transformers 5, which users of exported models may have.

The recipes themselves run with transformers 4.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from recipes.core.files import REPO_ROOT, sha256_of
from recipes.core.wheels import cache_dir
from tests.support.forked import run_forked
from tests.support.installing import require_package_index

REQUIREMENTS = Path(__file__).with_name("transformers_5.txt")
"""Pinned versions of transformers 5, and of dependencies whose installed version it refuses."""
MODULES = ("torch", "transformers.models.auto.tokenization_auto", "transformers.modeling_utils")
"""Modules that all forks share. Their import takes seconds."""


def transformers_5() -> Path:
    """Returns a folder with the packages of ``REQUIREMENTS``.

    The first call installs them into the cache. Later calls and test runs use the cached folder.
    """
    folder = cache_dir() / "tests" / sha256_of(REQUIREMENTS)[:16]
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-compile", "--require-hashes", "--requirement", str(REQUIREMENTS)]
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        target = Path(temporary) / "packages"
        command += [*options, "--target", str(target)]
        pip = subprocess.run(command, capture_output=True, text=True, check=False)
        require_package_index(pip)
        assert pip.returncode == 0, pip.stderr
        # An aborted installation leaves no folder. Another process may have installed meanwhile.
        with contextlib.suppress(OSError):
            target.rename(folder)
    assert folder.is_dir()
    return folder


SAVE_SCRIPT = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder + "-5")
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder + "-5")
"""


def run_with_transformers_5(code: str, *arguments: str | Path) -> None:
    """Runs Python code with transformers 5 in a fork, and asserts that it succeeds.

    ``arguments`` are ``sys.argv[1:]`` of the code.
    """
    variables = {"PYTHONPATH": f"{transformers_5()}{os.pathsep}{REPO_ROOT}", "HF_HUB_OFFLINE": "1"}
    variables |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(code)
        script.flush()
        command = [script.name, *map(str, arguments)]
        process = run_forked(MODULES, command, os.environ, Path.cwd(), variables)
    assert process.returncode == 0, process.stderr[-3000:]


def save_by_transformers_5(*folders: Path) -> list[Path]:
    """Saves the model and tokenizer of each folder NAME as NAME-5; returns the new folders."""
    run_with_transformers_5(SAVE_SCRIPT, *folders)
    return [folder.with_name(f"{folder.name}-5") for folder in folders]


TOKENIZE_SCRIPT = """
import json, sys
from transformers import AutoTokenizer
folder, texts, result = sys.argv[1:]
ids = AutoTokenizer.from_pretrained(folder)(json.loads(texts))["input_ids"]
open(result, "w").write(json.dumps(ids))
"""


def tokenize_by_transformers_5(folder: Path, texts: list[str]) -> list[list[int]]:
    """Returns each text's token ids, which transformers 5 computes with the folder's tokenizer."""
    with tempfile.NamedTemporaryFile() as result:
        run_with_transformers_5(TOKENIZE_SCRIPT, folder, json.dumps(texts), result.name)
        ids: list[list[int]] = json.loads(Path(result.name).read_text())
    return ids
