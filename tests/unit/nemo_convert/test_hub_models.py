"""Checks and downloads of hub models request only the files that are needed.

A local server replaces the hub. Code that uses the hub runs in a process of its own, because
``huggingface_hub`` reads the hub's address when it is imported.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_convert.headers import FIRST_BYTES, LFS_POINTER, SAMPLE_BYTES, SAMPLES
from nemo_convert.hf import tokenizer_sha256
from nemo_convert.preflight import EMBEDDING, HEAD
from tests.support.folders import expected_shapes, write_folder, write_sparse_weights
from tests.support.hub import FakeHub, fake_hub, run_with_hub, settings_for
from tests.support.manifests import edit_manifest
from tests.unit.conftest import LLAMA_CONFIG, SMALL_STUDENT, Complete, Launch, MakePlan

TOKEN = "hf_token_of_the_fake_hub"
NAME = "me/tiny"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
"""Names of the weights if the model has two shards."""
SMALL_FILES = {"config.json", "generation_config.json", "tokenizer.json", "README.md"}
"""Files of the model that are downloaded in full, apart from weights and their index."""
NEVER_READ = (
    "consolidated.safetensors",
    "pytorch_model.bin",
    "original/consolidated.00.pth",
    "original/tokenizer.model",
    "onnx/model.onnx",
    "onnx/model.safetensors",
    "checkpoint-500/model.safetensors",
    "checkpoint-500/config.json",
    "tokenizer/model.safetensors",
    "modeling_custom.py",
    "training_args.bin",
)
"""Files of the model that neither checks nor conversions read, so they are never downloaded."""
CHECK = f"""
from nemo_convert.preflight import check_model
print(*check_model({NAME!r}), sep="\\n")
"""
"""Code that prints the findings of a check; prints an empty line if there are none."""
DOWNLOAD = f"""
from nemo_convert.hub import download
print(*sorted(file.name for file in download({NAME!r}).rglob("*") if file.is_file()))
"""
"""Code that downloads the model and prints the names of its files."""


@pytest.fixture
def hub(hf_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with one gated model: ``SMALL_FILES``, one weights file, and ``NEVER_READ``."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (hf_folder / "generation_config.json").write_text("{}")
    (hf_folder / "README.md").write_text("---\nlicense: mit\n---\n")
    with fake_hub(TOKEN) as hub:
        files = {file.name: file.read_bytes() for file in hf_folder.iterdir()}
        hub.models[NAME] = files | dict.fromkeys(NEVER_READ, b"x" * 200_000)
        # A download of FIRST_BYTES bytes must be clearly less than the file.
        assert len(files[WEIGHTS]) > 2 * FIRST_BYTES
        yield hub


def split_weights(hub: FakeHub, folder: Path) -> None:
    """Replaces the weights of the hub's model with two shards and their index."""
    shapes = expected_shapes(LLAMA_CONFIG)
    # The shards take turns in the order of the weights' names.
    weight_map = {name: SHARDS[number % 2] for number, name in enumerate(sorted(shapes))}
    for shard in SHARDS:
        shard_shapes = {name: shapes[name] for name in weight_map if weight_map[name] == shard}
        write_sparse_weights(folder / shard, shard_shapes)
        hub.models[NAME][shard] = (folder / shard).read_bytes()
    hub.models[NAME].pop(WEIGHTS, None)
    write_index(hub, weight_map)


def write_index(hub: FakeHub, weight_map: object) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    hub.models[NAME][INDEX] = json.dumps(index).encode()


def store_head(hub: FakeHub, folder: Path) -> None:
    """Gives the hub's tied model a large embedding and an equal head (output layer).

    Both consist of zeros. The head is at the end of the file.
    """
    config = {**LLAMA_CONFIG, "vocab_size": 20_000}
    shapes = expected_shapes(config)
    write_sparse_weights(folder / WEIGHTS, {**shapes, HEAD: shapes[EMBEDDING]})
    hub.models[NAME] |= {
        "config.json": json.dumps(config).encode(),
        WEIGHTS: (folder / WEIGHTS).read_bytes(),
    }


def requested_files(hub: FakeHub) -> set[str]:
    return {path for path, _ in hub.downloads}


def dry_run(
    launch: Launch, hub: FakeHub, folder: Path, *overrides: str
) -> subprocess.CompletedProcess[str]:
    """Plans a run with the hub's model as its teacher."""
    model = ("recipe=llama_width_prune", "dry_run=true", f"model.hf_path={NAME}", *SMALL_STUDENT)
    return launch(*model, *overrides, **settings_for(hub, folder / "home"))


def test_a_check_of_shards_downloads_their_headers(hub: FakeHub, tmp_path: Path) -> None:
    split_weights(hub, tmp_path)
    assert run_with_hub(hub, tmp_path, CHECK).strip() == ""
    assert requested_files(hub) == {*SMALL_FILES, INDEX, *SHARDS}
    assert [hub.downloaded_bytes(shard) for shard in SHARDS] == [FIRST_BYTES, FIRST_BYTES]


def test_a_dry_run_downloads_and_checks_headers_and_small_files(
    hub: FakeHub, tmp_path: Path, launch: Launch
) -> None:
    config = {**LLAMA_CONFIG, "intermediate_size": 512}  # the stored weights have 256
    hub.models[NAME]["config.json"] = json.dumps(config).encode()
    process = dry_run(launch, hub, tmp_path)
    assert process.returncode == 1
    assert f"has shape [128, 256] in {WEIGHTS}, but [128, 512]" in process.stderr
    assert requested_files(hub) == {*SMALL_FILES, WEIGHTS}
    assert hub.downloaded_bytes(WEIGHTS) == FIRST_BYTES


def test_a_plan_reads_the_tokenizer_and_the_licence_of_a_hub_model(
    hub: FakeHub,
    hf_folder: Path,
    tmp_path: Path,
    launch: Launch,
    plan: MakePlan,
    complete: Complete,
) -> None:
    """Compares the tokenizer with that of the text, which another run prepared."""
    complete(plan(), "import_hf", "prepare_data")
    text = (tmp_path / "run").rename(tmp_path / "other") / "prepare_data"
    config = {**LLAMA_CONFIG, "vocab_size": 49152, "max_position_embeddings": 2048}
    write_folder(hf_folder, config)
    (hf_folder / TOKENIZER_CONFIG).write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    names = ("config.json", TOKENIZER_CONFIG, WEIGHTS)
    hub.models[NAME] |= {name: (hf_folder / name).read_bytes() for name in names}
    hub.models[NAME]["README.md"] = b"---\nlicense: other\nlicense_name: qwen-research\n---\n"
    data = f"stages.distill.inputs.data={text}"
    refused = dry_run(launch, hub, tmp_path, data)
    tokenizer_hash = tokenizer_sha256(hf_folder)
    assert f"different tokenizers: teacher {tokenizer_hash[:12]}, " in refused.stderr
    assert ", data t\n" in refused.stderr  # "t" is the placeholder hash of bare_manifest
    edit_manifest(text, tokenizer_sha256=tokenizer_hash)
    accepted = dry_run(launch, hub, tmp_path, data)
    assert accepted.returncode == 0, accepted.stderr
    warning = f"the licence of {NAME}, qwen-research, forbids commercial use"
    assert warning in accepted.stdout


def test_a_download_has_only_files_that_are_read(hub: FakeHub, tmp_path: Path) -> None:
    size = len(hub.models[NAME][WEIGHTS])
    assert set(run_with_hub(hub, tmp_path, DOWNLOAD).split()) == {*SMALL_FILES, WEIGHTS}
    assert requested_files(hub) == {*SMALL_FILES, WEIGHTS}
    assert hub.downloaded_bytes(WEIGHTS) == size


def test_shards_are_downloaded_unless_there_is_a_single_weights_file(
    hub: FakeHub, tmp_path: Path
) -> None:
    """If there is a ``model.safetensors``, transformers reads no shards."""
    single_file = hub.models[NAME][WEIGHTS]
    split_weights(hub, tmp_path)
    run_with_hub(hub, tmp_path / "shards", DOWNLOAD)
    assert requested_files(hub) == {*SMALL_FILES, INDEX, *SHARDS}
    hub.downloads.clear()
    hub.models[NAME][WEIGHTS] = single_file
    assert run_with_hub(hub, tmp_path / "single_file", CHECK).strip() == ""
    run_with_hub(hub, tmp_path / "single_file", DOWNLOAD)
    assert requested_files(hub) == {*SMALL_FILES, INDEX, WEIGHTS}


def test_samples_of_a_tied_head_are_compared(hub: FakeHub, tmp_path: Path) -> None:
    """A head that equals the embedding passes. A head whose second half differs does not."""
    store_head(hub, tmp_path)
    assert run_with_hub(hub, tmp_path, CHECK).strip() == ""
    # Samples of two tensors, head and embedding.
    sample_bytes = hub.downloaded_bytes(WEIGHTS) - FIRST_BYTES
    assert sample_bytes == pytest.approx(2 * SAMPLES * SAMPLE_BYTES, rel=0.2)
    weights = hub.models[NAME][WEIGHTS]
    assert sample_bytes < len(weights) / 5, "far less than the whole file"
    # The second half of the head: 10,000 of 20,000 rows of 128 BF16 values.
    half_bytes = 10_000 * 128 * 2
    hub.models[NAME][WEIGHTS] = weights[:-half_bytes] + b"\1" * half_bytes
    assert f"error: {HEAD} differs from" in run_with_hub(hub, tmp_path, CHECK)


def test_a_note_says_that_a_hub_does_not_serve_ranges(hub: FakeHub, tmp_path: Path) -> None:
    """Without range requests, a check reads headers, but does not compare head and embedding."""
    hub.serves_ranges = False
    store_head(hub, tmp_path)
    output = run_with_hub(hub, tmp_path, CHECK)
    assert output.startswith(f"note: {HEAD} ")
    assert "only as a whole" in output


def test_without_a_network_the_weights_in_the_cache_are_checked(
    hub: FakeHub, tmp_path: Path
) -> None:
    """After a check, the cache lacks the weights. After a download, the cache has them."""
    check_without_waits = f"import time\ntime.sleep = lambda _: None  # between retries\n{CHECK}"
    url, no_server = hub.url, "http://127.0.0.1:9"
    # The code that fills the cache, and the finding of a later check without a network.
    for code, finding in ((CHECK, f"could not read {WEIGHTS}"), (DOWNLOAD, "")):
        hub.url = url
        run_with_hub(hub, tmp_path, code)
        hub.url = no_server
        output = run_with_hub(hub, tmp_path, check_without_waits).strip()
        assert finding in output
        assert bool(output) == bool(finding)


@pytest.mark.parametrize(
    ("fault", "message", "fix"),
    [
        ("no weights", "has neither model.safetensors nor", "use a model with safetensors"),
        ("no shard", f"{NAME} does not have {SHARDS[1]} on the hub", "complete revision"),
        ("no weight map", "has no weight_map", "download the model again"),
        ("Git LFS pointer", f"{WEIGHTS} of {NAME} is damaged", "complete revision"),
        ("empty", f"{WEIGHTS} of {NAME} is damaged", "complete revision"),
        ("one byte too short", "is damaged on the hub: it has", "complete revision"),
    ],
)
def test_check_reports_faults_of_weights_on_the_hub(
    hub: FakeHub, tmp_path: Path, fault: str, message: str, fix: str
) -> None:
    files = hub.models[NAME]
    weights = files.pop(WEIGHTS)  # each fault replaces the weights
    damaged_weights = {
        "Git LFS pointer": LFS_POINTER,
        "empty": b"",
        "one byte too short": weights[:-1],
    }
    if fault in damaged_weights:
        files[WEIGHTS] = damaged_weights[fault]
    elif fault == "no shard":
        split_weights(hub, tmp_path)
        del files[SHARDS[1]]
    elif fault == "no weight map":
        write_index(hub, ["a"])  # a list instead of an object
    output = run_with_hub(hub, tmp_path, CHECK)
    assert output.startswith("error: ")
    assert message in output
    assert fix in output.partition("fix: ")[2]


def test_error_for_a_token_without_access_to_a_gated_model_names_hf_token(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    code = f"""
from recipes.core.errors import RecipeError
try:
    exec({CHECK!r})
except RecipeError as error:
    print(error.fix)
"""
    assert "HF_TOKEN for a gated model" in run_with_hub(hub, tmp_path, code)
