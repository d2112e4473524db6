"""No code of this repository may run code that comes with a model or a tokenizer."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from recipes.core.files import REPO_ROOT

LOADERS = ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "OVModelForCausalLM")


def loader_calls(file: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if node.func.attr == "from_pretrained" and getattr(owner, "id", "") in LOADERS:
                yield node


def test_every_loader_refuses_remote_code() -> None:
    """Without ``trust_remote_code=False``, transformers asks the user whether to run the code."""
    folders = ("recipes", "nemo_convert", "benchmarks")
    files = [file for folder in folders for file in (REPO_ROOT / folder).rglob("*.py")]
    calls = {f"{file}:{call.lineno}": call for file in files for call in loader_calls(file)}
    assert calls
    for location, call in calls.items():
        value = {k.arg: ast.unparse(k.value) for k in call.keywords}.get("trust_remote_code")
        assert value == "False", location
        if ast.unparse(call.func) == "AutoModelForCausalLM.from_pretrained":
            # The flag does not stop code for generation; this function loads a folder without it.
            assert location.startswith(f"{REPO_ROOT / 'nemo_convert' / 'hf.py'}:")
