"""Runs a large recipe with ``long_context=32k`` on a tiny model.

This option adds a second phase, ``distill_long``, with longer sequences and other text.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron.core.datasets.indexed_dataset import IndexedDataset

from nemo_convert.architecture import Architecture
from nemo_convert.convert import hf_weights
from nemo_convert.hf import Weights
from nemo_convert.nemo import find_checkpoint
from recipes.core.manifest import ARTIFACT
from recipes.distillation.results import DistillationResult
from tests.support.in_process import run_successfully
from tests.support.models import EVEN, write_tiny_model
from tests.support.pages import table
from tests.support.runs import DISTILL, manifest_of, settings, tiny


def run_in_two_phases(tmp_path: Path, text_file: Path) -> Path:
    """Runs the recipe and returns the run's directory.

    The second phase trains on two ranks with tensor and sequence parallelism. It does not use the
    recipe's context parallelism, which does not work on a CPU.
    """
    model = write_tiny_model(tmp_path / "model", text_file, "mistral", **EVEN)
    texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    prose, novel = tmp_path / "prose.txt", tmp_path / "novel.txt"  # only phase 2 reads the novel
    prose.write_text("\n\n".join(texts[:-200]))
    novel.write_text("\n\n".join(texts[-200:]))
    run_successfully(
        "recipe=mistral_nemo_12b_width",
        "long_context=32k",
        *tiny(model, prose, tmp_path / "run"),
        "hardware=cpu",
        "tasks=null",  # test_chain and test_tasks run benchmarks
        "engine=null",  # TensorRT-LLM needs a GPU
        *settings("score", num_calibration_samples=8, **{"resources.devices": 1}),
        *settings("prepare_data", processes=1, max_tokens=40_000),
        *settings("prepare_long_data", seq_length=256),
        f"stages.prepare_long_data.sources=[{prose},'{novel}#licence=CC-BY-4.0']",
        *settings("prune", target_hidden_size=48, hidden_size_divisor=8),
        *settings("prune", target_ffn_hidden_size=96, ffn_hidden_size_divisor=8),
        *settings("distill", **DISTILL),
        *settings("distill_long", **(DISTILL | {"max_steps": 3, "seq_length": 256})),
        *settings("distill_long", tensor_model_parallel_size=2, context_parallel_size=1),
        "stages.distill_long.resources.devices=2",
        *settings("evaluate", num_sequences=8, new_tokens=8, **{"resources.devices": 1}),
        cwd=tmp_path,
    )
    return tmp_path / "run"


def test_distill_long_continues_from_the_student_of_distill(
    tmp_path: Path, text_file: Path
) -> None:
    run = run_in_two_phases(tmp_path, text_file)
    first, second, exported = (
        manifest_of(run, stage) for stage in ("distill", "distill_long", "export_hf")
    )
    assert second.inputs["student"] == first.fingerprint
    assert exported.inputs["checkpoint"] == second.fingerprint
    student_shape, teacher_shape = (
        Architecture(**(manifest.architecture or {}))
        for manifest in (exported, manifest_of(run, "import_hf"))
    )
    assert (student_shape.hidden_size, student_shape.ffn_hidden_size) == (48, 96)
    assert student_shape.max_position_embeddings == teacher_shape.max_position_embeddings
    # Steps · sequences per step · tokens per sequence.
    assert first.result(DistillationResult).tokens == 4 * 4 * 64
    assert second.result(DistillationResult).tokens == 3 * 4 * 256
    exported_weights = Weights(run / "export_hf" / ARTIFACT)
    first_weights, second_weights = (
        dict(hf_weights(find_checkpoint(run / stage / ARTIFACT)))
        for stage in ("distill", "distill_long")
    )
    name = "model.layers.0.mlp.gate_proj.weight"
    assert exported_weights.read(name).equal(second_weights[name])
    assert not first_weights[name].equal(second_weights[name])
    page = (run / "report" / ARTIFACT / "report.html").read_text()
    phases = table(page, "phases")
    assert phases.index(">distill<") < phases.index(">distill_long<")
    assert "novel.txt" in page
    card = (run / "export_hf" / ARTIFACT / "README.md").read_text()
    for line in (
        "- Distilled on 1,024 tokens in 4 steps.\n",
        "- Distilled on 3,072 tokens in 3 steps.\n",
        "- Text: `prose.txt`. Licence: not recorded.\n",
        "- Text: `novel.txt`. Licence: CC-BY-4.0.\n",
    ):
        assert line in card
    # Both phases read ``prose.txt``. What the first holds out must not be trained on in the second.
    held_out, trained = (
        {tuple(ids.tolist()) for ids in IndexedDataset(str(run / stage / ARTIFACT / split))}
        for stage, split in (("prepare_data", "heldout"), ("prepare_long_data", "train"))
    )
    assert held_out
    assert not held_out & trained
