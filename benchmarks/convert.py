"""Compares time and memory of conversion with loading and saving in transformers.

    python -m benchmarks.convert [--model FOLDER_OR_SOURCE] [--repeats N]
    python -m benchmarks.convert --billions 7

The compared programs are called sides. ``transformers``, the baseline, loads and saves the model.
``to-nemo`` converts the model to a NeMo checkpoint, and ``to-hf`` converts the checkpoint back.
``verify`` compares logits and weights of the model with those of the checkpoint.

Sides run one after the other, each in its own process. The baseline runs first in one repeat and
last in the next. The table has the shortest time and the lowest peak of all repeats. Times exclude
imports. Memory is the peak minus the memory after imports. ``anonymous`` memory is ``resident``
memory without pages of mapped files, which the system can drop at any time.

With ``--billions N``, the model is a random Llama with about N billion parameters in bfloat16. The
baseline ``copy`` is then a plain copy of the model's files. Files are not in the page cache when a
side starts, and time stops when all output is on the disk. After the conversion to NeMo and back,
the weights are compared with the original weights. The disk needs space for three such models.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.launching import call_in_process, model_folder, run_main
from recipes.core.errors import RecipeError

SIDES = ("transformers", "to-nemo", "to-hf", "verify")
"""The first side is the baseline."""
COLD_SIDES = ("copy", "to-nemo", "to-hf")
"""Sides with ``--billions``; the first is the baseline. They start without a warm page cache."""
LAYER = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
"""Sizes of a layer of Llama 3.1 8B."""
LAYER_BILLIONS = 0.218
"""Billions of parameters of this layer. ``--billions`` does not count embeddings."""
SAMPLE_SECONDS = 0.005
"""Time between two readings of the memory."""


def prepare_side(side: str, folder: Path, scratch: Path) -> Callable[[], object]:
    """Imports a side's libraries, and returns the function to measure.

    The output is in ``scratch``. ``to-hf`` and ``verify`` read the output of ``to-nemo`` there.
    """
    if side == "copy":
        return lambda: shutil.copytree(folder, scratch / "copy")
    if side == "transformers":
        from transformers import AutoTokenizer

        from nemo_convert.hf import load_causal_lm

        def load_and_save() -> None:
            load_causal_lm(folder, "auto").save_pretrained(scratch / "copy")
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            tokenizer.save_pretrained(scratch / "copy")

        return load_and_save
    from nemo.collections import llm  # noqa: F401

    from nemo_convert import convert, nemo, parity, streaming  # noqa: F401

    nemo.initialize(nemo.Parallelism())
    checkpoint = scratch / "model.nemo"
    return {
        "to-nemo": lambda: convert.to_nemo(folder, checkpoint),
        "to-hf": lambda: convert.to_hf(checkpoint, scratch / "back"),
        "verify": lambda: parity.compare(folder, checkpoint).require("benchmark"),
    }[side]


def memory() -> dict[str, int]:
    """Returns this process's current ``anonymous`` and ``resident`` memory, in bytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    fields_by_name = {"anonymous": "RssAnon", "resident": "VmRSS"}
    kib = {name: fields[field].split()[0] for name, field in fields_by_name.items()}  # "1234 kB"
    return {name: int(value) * 1024 for name, value in kib.items()}


def run_and_measure(work: Callable[[], object]) -> dict[str, float]:
    """Calls ``work`` and returns its ``seconds``, ``cpu_seconds``, ``anonymous`` and ``resident``.

    ``anonymous`` and ``resident`` are the rise of both kinds of memory to their peaks, in bytes.
    """
    before = memory()
    peak = dict(before)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            for name, value in memory().items():
                peak[name] = max(peak[name], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, cpu_start = time.perf_counter(), time.process_time()
    try:
        work()
    finally:
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        done.set()
        watcher.join()
    rise = {name: peak[name] - before[name] for name in peak}
    return {"seconds": seconds, "cpu_seconds": cpu, **rise}


def measure_side(side: str, folder: Path, scratch: Path, cold: bool) -> dict[str, float]:
    """Measures a side in this process; with ``cold``, until all output is on the disk."""
    work = prepare_side(side, folder, scratch)

    def work_to_disk() -> None:
        work()
        flush(scratch)

    return run_and_measure(work_to_disk if cold else work)


def flush(folder: Path, drop_cache: bool = False) -> None:
    """Waits until files are on the disk. ``drop_cache`` then drops them from the page cache."""
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if drop_cache:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_sides(folder: Path, repeats: int, cold: bool = False) -> dict[str, list[dict[str, float]]]:
    """Measures each of ``SIDES``, or of ``COLD_SIDES`` if ``cold``, in its own process.

    Returns:
        The results of ``run_and_measure`` by side, one per repeat.
    """
    sides = COLD_SIDES if cold else SIDES
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(repeats):
        with tempfile.TemporaryDirectory() as temporary:
            scratch = Path(temporary)
            baseline_last = (*sides[1:], sides[0])
            for side in sides if number % 2 == 0 else baseline_last:
                if cold:
                    flush(folder, drop_cache=True)
                    flush(scratch, drop_cache=True)
                measurement = call_in_process(
                    "benchmarks.convert:measure_side", side, folder, scratch, cold
                )
                runs[side].append(measurement)
                os.sync()  # unwritten data of one side must not slow down the next
                shutil.rmtree(scratch / "copy", ignore_errors=True)
                if cold and side == "to-hf":  # makes space for the baseline's copy
                    shutil.rmtree(scratch / "model.nemo")
            if cold:
                require_same_weights(folder, scratch / "back")
    return runs


def write_random_model(folder: Path, like: Path, shape: Mapping[str, int | bool]) -> None:
    """Writes a random Llama in bfloat16.

    The tokenizer and the config are those of the Llama in ``like``. ``shape`` replaces fields of
    the config.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from nemo_convert.hf import copy_side_files, write_weights

    copy_side_files(like, folder)
    config = AutoConfig.from_pretrained(like, **shape, trust_remote_code=False)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    with torch.device("meta"):  # only the names and shapes of the weights are needed
        model = AutoModelForCausalLM.from_config(config)
    # A generator, so that ``write_weights`` has at most two shards in memory.
    weights = ((name, torch.randn(p.shape).bfloat16()) for name, p in model.named_parameters())
    write_weights(weights, folder)


def require_same_weights(folder: Path, back: Path) -> None:
    """Raises ``RecipeError`` unless both folders have the same names and bits of weights."""
    import torch

    from nemo_convert.hf import Weights

    original, converted = Weights(folder), Weights(back)
    if original.names() != converted.names():
        raise RecipeError(f"the names of the weights in {back} and {folder} differ", fix="")
    for name in original.names():
        # As integers, 0 and -0 differ, and a NaN equals itself.
        bits, converted_bits = (w.read(name).view(torch.int16) for w in (original, converted))
        if not torch.equal(bits, converted_bits):
            raise RecipeError(f"{name} differs after a conversion to NeMo and back", fix="")


def table(runs: dict[str, list[dict[str, float]]], size: int) -> str:
    """Returns a table of each side's lowest measurements in the result of ``run_sides``.

    ``size`` is the model's weight files in bytes, for the column ``x size``.
    """
    lowest = {
        side: {name: min(run[name] for run in side_runs) for name in side_runs[0]}
        for side, side_runs in runs.items()
    }
    baseline = next(iter(lowest.values()))
    rows = [
        f"checkpoint: {size / 1e6:.0f} MB",
        f"{'':14}{'seconds':>9}{'x baseline':>12}{'resident':>12}{'x size':>8}{'anonymous':>13}",
    ]
    for side, best in lowest.items():
        ratio = best["seconds"] / baseline["seconds"]
        rows.append(
            f"{side:14}{best['seconds']:9.2f}{ratio:12.2f}{best['resident'] / 1e6:9.0f} MB"
            f"{best['resident'] / size:8.2f}{best['anonymous'] / 1e6:10.0f} MB"
        )
    return "\n".join(rows)


def main() -> None:
    """Reads the command line, measures all sides and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert")
    parser.add_argument("--model", help="Hugging Face folder or source; default: SmolLM2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--billions",
        type=float,
        help="billions of parameters of a random model, with the tokenizer of --model",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = model_folder(args.model)
        if args.billions:
            layers = round(args.billions / LAYER_BILLIONS)
            write_random_model(Path(temporary), folder, {**LAYER, "num_hidden_layers": layers})
            folder = Path(temporary)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        print(table(run_sides(folder, args.repeats, bool(args.billions)), size))


if __name__ == "__main__":
    run_main("benchmarks.convert")
