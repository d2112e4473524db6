"""No code of this repository may run code that comes with a model or a tokenizer."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from recipes.core.files import REPO_ROOT

LOADERS = ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "OVModelForCausalLM")
"""Classes whose ``from_pretrained`` can run code from a model's folder."""


def loader_calls(file: Path) -> Iterator[ast.Call]:
    """Yields all calls of ``from_pretrained`` of a class in ``LOADERS`` in a Python file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            class_name = getattr(node.func.value, "id", "")  # "" unless it is a plain name
            if node.func.attr == "from_pretrained" and class_name in LOADERS:
                yield node


def test_every_loader_call_sets_trust_remote_code_to_false() -> None:
    """Without ``trust_remote_code=False``, transformers asks the user whether to run the code."""
    folders = ("recipes", "nemo_convert", "benchmarks")
    files = [file for folder in folders for file in (REPO_ROOT / folder).rglob("*.py")]
    calls = {f"{file}:{call.lineno}": call for file in files for call in loader_calls(file)}
    assert calls  # otherwise, the loop below checks nothing
    for location, call in calls.items():
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert arguments.get("trust_remote_code") == "False", location
        if ast.unparse(call.func) == "AutoModelForCausalLM.from_pretrained":
            # Even with False, transformers 4 runs a folder's code for generation. Only
            # ``load_causal_lm`` in hf.py may load a model: it first copies the folder without code.
            assert location.startswith(f"{REPO_ROOT / 'nemo_convert' / 'hf.py'}:")
