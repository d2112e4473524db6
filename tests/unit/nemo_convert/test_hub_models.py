"""Checks and downloads request only the files that are needed. A local server is the hub."""

from __future__ import annotations

import json
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
SMALL_FILES = {"config.json", "generation_config.json", "tokenizer.json", "README.md"}
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
CHECK = f"""
from nemo_convert.preflight import check_model
print(*check_model({NAME!r}), sep="\\n")
"""
DOWNLOAD = f"""
from nemo_convert.hub import download
print(*sorted(file.name for file in download({NAME!r}).rglob("*") if file.is_file()))
"""


@pytest.fixture
def hub(hf_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with one gated model: a file of weights, and files that are never read."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (hf_folder / "generation_config.json").write_text("{}")
    (hf_folder / "README.md").write_text("---\nlicense: mit\n---\n")
    with fake_hub(TOKEN) as hub:
        files = {file.name: file.read_bytes() for file in hf_folder.iterdir()}
        hub.models[NAME] = files | dict.fromkeys(NEVER_READ, b"x" * 200_000)
        assert len(files[WEIGHTS]) > 2 * FIRST_BYTES
        yield hub


def split_weights(hub: FakeHub, folder: Path) -> None:
    """Replaces the weights of the hub's model with two shards and their index."""
    names = sorted(expected_shapes(LLAMA_CONFIG))
    weight_map = {name: SHARDS[number % 2] for number, name in enumerate(names)}
    for shard in SHARDS:
        shapes = expected_shapes(LLAMA_CONFIG)
        shard_shapes = {name: shapes[name] for name in names if weight_map[name] == shard}
        write_sparse_weights(folder / shard, shard_shapes)
        hub.models[NAME][shard] = (folder / shard).read_bytes()
    del hub.models[NAME][WEIGHTS]
    write_index(hub, weight_map)


def write_index(hub: FakeHub, weight_map: object) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    hub.models[NAME][INDEX] = json.dumps(index).encode()


def store_head(hub: FakeHub, folder: Path) -> None:
    """Gives the hub's tied model a large embedding and a head, which are equal: both are zeros."""
    config = {**LLAMA_CONFIG, "vocab_size": 20_000}
    shapes = expected_shapes(config)
    write_sparse_weights(folder / WEIGHTS, {**shapes, HEAD: shapes[EMBEDDING]})
    hub.models[NAME] |= {
        "config.json": json.dumps(config).encode(),
        WEIGHTS: (folder / WEIGHTS).read_bytes(),
    }


def requested_files(hub: FakeHub) -> set[str]:
    return {path for path, _ in hub.downloads}


def test_a_check_downloads_headers_and_small_files(hub: FakeHub, tmp_path: Path) -> None:
    assert run_with_hub(hub, tmp_path, CHECK).strip() == ""
    assert requested_files(hub) == {*SMALL_FILES, WEIGHTS}
    assert hub.downloaded_bytes(WEIGHTS) == FIRST_BYTES


def test_a_check_of_shards_downloads_their_headers(hub: FakeHub, tmp_path: Path) -> None:
    split_weights(hub, tmp_path)
    assert run_with_hub(hub, tmp_path, CHECK).strip() == ""
    assert requested_files(hub) == {*SMALL_FILES, INDEX, *SHARDS}
    assert [hub.downloaded_bytes(shard) for shard in SHARDS] == [FIRST_BYTES, FIRST_BYTES]


def test_a_dry_run_checks_the_headers(hub: FakeHub, tmp_path: Path, launch: Launch) -> None:
    config = {**LLAMA_CONFIG, "intermediate_size": 512}
    hub.models[NAME]["config.json"] = json.dumps(config).encode()
    overrides = (
        "recipe=llama_width_prune",
        "dry_run=true",
        f"model.hf_path={NAME}",
        *SMALL_STUDENT,
    )
    done = launch(*overrides, **settings_for(hub, tmp_path / "home"))
    assert done.returncode == 1
    assert f"has shape [128, 256] in {WEIGHTS}, but [128, 512]" in done.stderr
    assert requested_files(hub) == {*SMALL_FILES, WEIGHTS}
    assert hub.downloaded_bytes(WEIGHTS) == FIRST_BYTES


def test_a_plan_warns_of_the_licence_of_a_hub_model(
    hub: FakeHub, tmp_path: Path, launch: Launch
) -> None:
    card = b"---\nlicense: other\nlicense_name: qwen-research\n---\n"
    hub.models[NAME]["README.md"] = card
    overrides = (
        "recipe=llama_width_prune",
        "dry_run=true",
        f"model.hf_path={NAME}",
        *SMALL_STUDENT,
    )
    done = launch(*overrides, **settings_for(hub, tmp_path / "home"))
    assert f"the licence of {NAME}, qwen-research, forbids commercial use" in done.stdout, (
        done.stderr
    )


def test_a_plan_compares_the_tokenizer_of_a_hub_model_with_that_of_the_text(
    hub: FakeHub,
    hf_folder: Path,
    tmp_path: Path,
    launch: Launch,
    plan: MakePlan,
    complete: Complete,
) -> None:
    complete(plan(), "import_hf", "prepare_data")
    text = (tmp_path / "run").rename(tmp_path / "other") / "prepare_data"
    config = {**LLAMA_CONFIG, "vocab_size": 49152, "max_position_embeddings": 2048}
    write_folder(hf_folder, config)
    (hf_folder / TOKENIZER_CONFIG).write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    names = ("config.json", TOKENIZER_CONFIG, WEIGHTS)
    hub.models[NAME] |= {name: (hf_folder / name).read_bytes() for name in names}
    overrides = (
        "recipe=llama_width_prune",
        "dry_run=true",
        f"model.hf_path={NAME}",
        f"stages.distill.inputs.data={text}",
        *SMALL_STUDENT,
    )
    refused = launch(*overrides, **settings_for(hub, tmp_path / "home"))
    tokenizer = tokenizer_sha256(hf_folder)
    assert f"different tokenizers: teacher {tokenizer[:12]}, " in refused.stderr
    assert ", data t\n" in refused.stderr
    edit_manifest(text, tokenizer_sha256=tokenizer)
    accepted = launch(*overrides, **settings_for(hub, tmp_path / "home"))
    assert accepted.returncode == 0, accepted.stderr


def test_a_download_has_only_files_that_are_read(hub: FakeHub, tmp_path: Path) -> None:
    size = len(hub.models[NAME][WEIGHTS])
    assert set(run_with_hub(hub, tmp_path, DOWNLOAD).split()) == {*SMALL_FILES, WEIGHTS}
    assert requested_files(hub) == {*SMALL_FILES, WEIGHTS}
    assert hub.downloaded_bytes(WEIGHTS) == size


def test_a_download_of_shards(hub: FakeHub, tmp_path: Path) -> None:
    split_weights(hub, tmp_path)
    run_with_hub(hub, tmp_path, DOWNLOAD)
    assert requested_files(hub) == {*SMALL_FILES, INDEX, *SHARDS}


def test_shards_beside_one_file_of_weights_are_not_downloaded(hub: FakeHub, tmp_path: Path) -> None:
    """If there is a ``model.safetensors``, transformers reads no shards."""
    single_file = hub.models[NAME][WEIGHTS]
    split_weights(hub, tmp_path)
    hub.models[NAME][WEIGHTS] = single_file
    assert run_with_hub(hub, tmp_path, CHECK).strip() == ""
    run_with_hub(hub, tmp_path, DOWNLOAD)
    assert requested_files(hub) == {*SMALL_FILES, INDEX, WEIGHTS}


def test_samples_of_a_tied_head_are_compared(hub: FakeHub, tmp_path: Path) -> None:
    """A head that equals the embedding passes. A head whose second half differs does not."""
    store_head(hub, tmp_path)
    assert run_with_hub(hub, tmp_path, CHECK).strip() == ""
    # Bytes of the samples of both tensors, head and embedding.
    samples = hub.downloaded_bytes(WEIGHTS) - FIRST_BYTES
    assert samples == pytest.approx(2 * SAMPLES * SAMPLE_BYTES, rel=0.2)
    weights = hub.models[NAME][WEIGHTS]
    assert samples < len(weights) / 5
    hub.models[NAME][WEIGHTS] = weights[: -10_000 * 256] + b"\1" * 10_000 * 256  # 256-byte rows
    assert f"error: {HEAD} differs from" in run_with_hub(hub, tmp_path, CHECK)


def test_a_note_says_that_a_hub_does_not_serve_ranges(hub: FakeHub, tmp_path: Path) -> None:
    """A check reads the headers even so, but the head is compared only after the download."""
    hub.serves_ranges = False
    store_head(hub, tmp_path)
    output = run_with_hub(hub, tmp_path, CHECK)
    assert output.startswith(f"note: {HEAD} ")
    assert "only as a whole" in output


def test_without_a_network_the_weights_in_the_cache_are_checked(
    hub: FakeHub, tmp_path: Path
) -> None:
    check = f"import time\ntime.sleep = lambda _: None  # between retries\n{CHECK}"
    url, no_server = hub.url, "http://127.0.0.1:9"
    for code, expected in ((CHECK, f"could not read {WEIGHTS}"), (DOWNLOAD, "")):
        hub.url = url
        run_with_hub(hub, tmp_path, code)  # fills the cache
        hub.url = no_server
        output = run_with_hub(hub, tmp_path, check).strip()
        assert expected in output
        assert bool(output) == bool(expected)


@pytest.mark.parametrize(
    ("fault", "message", "fix"),
    [
        ("no weights", "has neither model.safetensors nor", "use a model with safetensors"),
        ("no shard", f"{NAME} does not have {SHARDS[1]} on the hub", "complete revision"),
        ("no map", "has no weight_map", "download the model again"),
        ("pointer", f"{WEIGHTS} of {NAME} is damaged", "complete revision"),
        ("empty", f"{WEIGHTS} of {NAME} is damaged", "complete revision"),
        ("short", "is damaged on the hub: it has", "complete revision"),
    ],
)
def test_faults_of_weights_on_the_hub(
    hub: FakeHub, tmp_path: Path, fault: str, message: str, fix: str
) -> None:
    files = hub.models[NAME]
    if fault in {"no shard", "no map"}:
        split_weights(hub, tmp_path)
    if fault == "no weights":
        del files[WEIGHTS]
    elif fault == "no shard":
        del files[SHARDS[1]]
    elif fault == "no map":
        write_index(hub, ["a"])
    else:
        files[WEIGHTS] = {"pointer": LFS_POINTER, "empty": b"", "short": files[WEIGHTS][:-1]}[fault]
    output = run_with_hub(hub, tmp_path, CHECK)
    assert output.startswith("error: ")
    assert message in output
    assert fix in output.partition("fix: ")[2]


def test_token_without_access_to_a_gated_model(
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
