"""Tests the evaluation of built models: OpenVINO in this process, llama.cpp in its server."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from lm_eval.api.instance import Instance
from transformers import AutoTokenizer

from nemo_convert.gguf_file import FILE, write
from nemo_convert.hf import load_causal_lm
from recipes.core.errors import RecipeError
from recipes.core.manifest import ARTIFACT, read_manifest, write_manifest
from recipes.core.metrics import METRICS, MetricsLog
from recipes.core.run_state import InputRef, Request
from recipes.core.stage import Input
from recipes.core.stage_process import start_command
from recipes.data.token_sequences import TextSequences
from recipes.engines import served, server
from recipes.engines.results import EngineResult
from recipes.engines.server import free_port, llama_command, serving
from recipes.engines.settings import BuildEngineConfig, EvaluateServedConfig
from recipes.evaluation import packed_lm
from recipes.evaluation.predictions import TEACHER, Predictor
from recipes.evaluation.results import ServedResult
from recipes.evaluation.text_quality import score
from recipes.stages import build_engine, evaluate_served
from tests.support.launcher import write_program
from tests.support.manifests import as_input, bare_manifest
from tests.support.runs import make_artifact_folder
from tests.unit.engines.test_tensorrt_llm import API

LENGTH = 255
"""Maximum tokens of a prompt: the tiny model's positions minus 1."""
LIMIT = 3
"""Items of a task."""


@pytest.fixture(scope="module")
def gguf(odd_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with exact weights, for llama.cpp."""
    file = tmp_path_factory.mktemp("gguf") / FILE
    write(odd_llama, file, "f32")
    return file


@pytest.fixture(scope="module")
def llama(odd_llama: Path, gguf: Path) -> Iterator[served.LlamaCppLM]:
    port = free_port()
    with serving(llama_command(gguf, port, LENGTH + 1, 1), port, 120) as address:
        yield served.LlamaCppLM(address, odd_llama, LENGTH)


@pytest.fixture(scope="module")
def student(odd_llama: Path) -> packed_lm.PackedLM:
    tokenizer = AutoTokenizer.from_pretrained(odd_llama)
    model = load_causal_lm(odd_llama)
    return packed_lm.PackedLM(model, tokenizer, 600, lambda done, total: None, LENGTH)


def children() -> set[int]:
    """Returns the process ids of this process's living children."""
    # A file holds: process id (name) state parent ...; the name may contain spaces.
    stats = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    rows = [(text.split()[0], *text.rpartition(")")[2].split()[:2]) for text in stats]
    return {int(pid) for pid, state, ppid in rows if int(ppid) == os.getpid() and state != "Z"}


def test_llama_cpp_gives_the_log_likelihoods_of_transformers(
    llama: served.LlamaCppLM, student: packed_lm.PackedLM
) -> None:
    """Some contexts are truncated. Responses also say which continuations are greedy."""
    for task in packed_lm.load_tasks(["sciq", "lambada_openai"], "pypi", {"sciq": 1}):
        expected, answers = (packed_lm.answer(lm, task, LIMIT, 1) for lm in (student, llama))
        for pair in zip(answers, expected, strict=True):
            assert len({(item.id, item.hash) for item in pair}) == 1
            responses = (torch.tensor(item.response).double().flatten() for item in pair)
            torch.testing.assert_close(*responses, rtol=1e-3, atol=0.02)
    with pytest.raises(RecipeError, match="256 tokens"):
        llama._loglikelihood_tokens([(None, [1], [2] * (LENGTH + 1))])
    context = llama.tok_encode("The history of the")
    likeliest = student.model(torch.tensor([context])).logits[0, -1].argmax().item()
    assert llama.token_score(context, likeliest)[1]
    assert not llama.token_score(context, (likeliest + 1) % 293)[1]  # of 293 tokens


def test_llama_cpp_gives_the_losses_of_transformers(
    llama: served.LlamaCppLM, student: packed_lm.PackedLM, tmp_path: Path
) -> None:
    """The text includes the token that ends documents, at which a server would stop."""
    end = student.tokenizer.eos_token_id
    tokens = torch.randint(3, 290, (2, 24), generator=torch.Generator().manual_seed(0))
    tokens[0, 11] = end
    text = TextSequences.of(tokens, end)
    assert not text.prediction_mask.all()
    log = MetricsLog(tmp_path / "metrics")
    expected = score({TEACHER: Predictor.of(student.model)}, text, 1, log)[TEACHER].losses
    assert llama.losses(text) == pytest.approx(expected, rel=1e-3)
    assert expected[0] != pytest.approx(expected[1], rel=1e-3)


def test_llama_cpp_generates_the_text_of_transformers(
    llama: served.LlamaCppLM, student: packed_lm.PackedLM, odd_llama: Path, tmp_path: Path
) -> None:
    """The second student's folder has a repetition penalty, which changes the text."""
    settings = {"until": ["."], "max_gen_toks": 12, "do_sample": False}
    prompts = ("The history of the", "A river is a")
    instances = [Instance("generate_until", {}, (p, settings), n) for n, p in enumerate(prompts)]
    expected = student.generate_until(instances)
    assert llama.generate_until(instances) == expected
    assert all(expected)
    folder = shutil.copytree(odd_llama, tmp_path / "penalty")
    add_generation_settings(folder, repetition_penalty=1.9)
    penalised = packed_lm.PackedLM(
        load_causal_lm(folder), student.tokenizer, 600, lambda done, total: None, LENGTH
    )
    address = llama.base_url.removesuffix("/v1/completions")
    answers = served.LlamaCppLM(address, folder, LENGTH).generate_until(instances)
    assert answers == penalised.generate_until(instances) != expected


def test_the_client_of_trtllm_serve_uses_only_what_that_server_has(
    gguf: Path,
    student: packed_lm.PackedLM,
    odd_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fake ``trtllm-serve`` records its arguments and starts llama.cpp's server.

    Both servers have the same protocol. The options, routes and fields of TensorRT-LLM are those in
    its source.
    """
    words = shlex.join(llama_command(gguf, 99999, LENGTH + 1, 1)).replace("99999", "${!#}")
    write_program(
        tmp_path / "bin" / "trtllm-serve", f'echo "$@" >{tmp_path}/arguments; exec {words}'
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setattr(served, "require_backend", lambda _: None)
    requested: list[str] = []
    for method in ("get", "post"):
        send = getattr(requests, method)

        def record(url: str, *args: Any, _send: Any = send, **kwargs: Any) -> Any:
            requested.append("/" + url.split("/", 3)[3])
            return _send(url, *args, **kwargs)

        monkeypatch.setattr(requests, method, record)
    settings = {"until": ["."], "max_gen_toks": 12, "do_sample": False}
    request = Instance("generate_until", {}, ("The history of the", settings), 0)
    artifact = as_input(tmp_path / "engine", "engine", EngineResult("tensorrt_llm", "bf16", 1, 1))
    artifact.manifest.config["tensor_parallel_size"] = 1
    with served.served_lm(config(), artifact, odd_llama, LENGTH) as client:
        assert client.generate_until([request]) == student.generate_until([request])
    assert isinstance(client, served.ServedLM)
    assert client.timeout == served.REQUEST_SECONDS
    assert {*requested} <= {*API["routes of trtllm-serve"]["routes"]}
    options = (tmp_path / "arguments").read_text().split()[1::2]
    assert {"--host", "--port"} < {*options} <= {*API["trtllm-serve"]["options"]}
    client.penalty = client.penalty_request(1.9)
    payload = client._create_payload([[1]], generate=True, gen_kwargs=dict(settings))
    assert payload["repetition_penalty"] == 1.9
    assert payload.keys() <= {*API["requests of trtllm-serve"]["request"]}


def test_prompts_fit_the_engine() -> None:
    """An engine refuses longer prompts after hours; the PyTorch backend would shorten answers."""
    default: dict[str, Any] = {"max_seq_len": None, "max_input_len": None}
    assert served.engine_limits(default) == []
    assert served.engine_limits(default | {"max_seq_len": 2048}) == [2047]
    assert served.engine_limits({"max_seq_len": 2048, "max_input_len": 1024}) == [2047, 1024]


def add_generation_settings(folder: Path, **settings: Any) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_generation_settings_that_a_server_lacks_are_refused(
    even_llama: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(even_llama, tmp_path / "student")
    add_generation_settings(folder, no_repeat_ngram_size=3)
    inputs, out = gguf_inputs(tmp_path, folder, "f16"), make_artifact_folder(tmp_path, "stage")
    with pytest.raises(RecipeError, match="no_repeat_ngram_size"):
        evaluate_served.run(config(tasks=["gsm8k_cot"]), inputs, out)


def test_an_openvino_engine_is_compared_with_its_student(even_llama: Path, tmp_path: Path) -> None:
    checkpoint = as_input(tmp_path / "checkpoint", "checkpoint_hf", artifact=even_llama)
    largest_gap = {}
    for precision in ("fp32", "int4"):
        engine = tmp_path / precision / ARTIFACT
        engine.mkdir(parents=True)
        engine_config = BuildEngineConfig("build_engine", precision=precision, group_size=16)
        result = build_engine.run(engine_config, {"checkpoint": checkpoint}, engine).result
        inputs = {"checkpoint": checkpoint}
        inputs["artifact"] = Input(engine.parent, bare_manifest("build_engine", "engine", result))
        out = make_artifact_folder(tmp_path, f"served_{precision}")
        served_scores = evaluate_served.run(config(tasks=["piqa"]), inputs, out).result
        assert isinstance(result, EngineResult)
        assert (served_scores.server, served_scores.precision) == ("openvino", precision)
        lines = (out / "samples" / "piqa.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines]
        assert len(samples) == served_scores.tasks["piqa"].items == LIMIT
        gaps = [s["served"]["response"][0][0] - s["student"]["response"][0][0] for s in samples]
        largest_gap[precision] = max(map(abs, gaps))
        answers = served_scores.tasks["piqa"].answers
        assert answers.difference.value == pytest.approx(
            answers.served.value - answers.student.value
        )
    assert largest_gap["fp32"] < 1e-3
    assert largest_gap["int4"] > 0.05


def config(**settings: Any) -> EvaluateServedConfig:
    defaults: dict[str, Any] = {"tasks": ["sciq"], "limit": LIMIT, "threads": 1}
    return EvaluateServedConfig("evaluate_served", **defaults | settings)


def gguf_inputs(root: Path, folder: Path, weight_type: str) -> dict[str, Input]:
    file = root / "file" / FILE
    file.parent.mkdir()
    result = write(folder, file, weight_type)
    checkpoint = as_input(root / "checkpoint", "checkpoint_hf", artifact=folder)
    return {
        "checkpoint": checkpoint,
        "artifact": as_input(root / "artifact", "gguf", result, file.parent),
    }


def test_a_gguf_file_is_compared_with_its_student(even_llama: Path, tmp_path: Path) -> None:
    before = children()
    inputs = gguf_inputs(tmp_path, even_llama, "q8_0")
    result = evaluate_served.run(config(), inputs, make_artifact_folder(tmp_path, "stage")).result
    assert (result.server, result.precision, result.text) == ("llama_cpp", "q8_0", None)
    answers = result.tasks["sciq"].answers
    assert 0 < abs(answers.difference.value) < 1
    assert answers.difference.low < answers.difference.value < answers.difference.high
    assert children() <= before


def test_a_killed_stage_starts_again_and_gives_the_same_result(
    even_llama: Path, tmp_path: Path
) -> None:
    inputs, stage = gguf_inputs(tmp_path, even_llama, "q8_0"), tmp_path / "stage"
    for item in inputs.values():
        write_manifest(item.directory, item.manifest)
    references = {name: InputRef.of(item.directory) for name, item in inputs.items()}
    request = Request("evaluate_served", "f", "c", references, asdict(config())).write(stage)
    command = start_command(evaluate_served.__name__, request, 1, sys.executable)
    first = subprocess.Popen(command, start_new_session=True)
    while not (stage / METRICS).exists():  # written while the model is served
        assert first.poll() is None
        time.sleep(0.05)
    first.kill()
    first.wait()
    assert read_manifest(stage) is None
    subprocess.run(command, check=True)
    killed = read_manifest(stage)
    assert killed is not None
    out = make_artifact_folder(tmp_path, "unkilled")
    assert (
        killed.result(ServedResult).tasks == evaluate_served.run(config(), inputs, out).result.tasks
    )


@pytest.mark.parametrize("problem", ["missing", "damaged", "killed"])
def test_a_failing_server_gives_one_message(
    even_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    before, inputs = children(), gguf_inputs(tmp_path, even_llama, "f16")
    messages = {
        "missing": "llama.cpp's server is missing",
        "damaged": "did not start",
        "killed": "ended during a request: killed by SIGKILL",
    }
    if problem == "missing":
        monkeypatch.setattr(server, "has_llama_server", lambda: False)
    elif problem == "damaged":
        (inputs["artifact"].artifact / FILE).write_bytes(b"GGUF" + bytes(100))
    else:
        score_token, calls = served.LlamaCppLM.token_score, []

        def kill(self: Any, context: list[int], token: int) -> tuple[float, bool]:
            calls.append(token)
            if len(calls) == 5:
                for pid in children() - before:
                    os.kill(pid, signal.SIGKILL)
            return score_token(self, context, token)

        monkeypatch.setattr(served.LlamaCppLM, "token_score", kill)
    with pytest.raises(RecipeError, match=messages[problem]):
        evaluate_served.run(config(), inputs, make_artifact_folder(tmp_path, "stage"))
    assert children() <= before


def test_a_server_dies_with_its_stage(gguf: Path) -> None:
    """The server also stops after ``kill -9`` of the stage."""
    port = free_port()
    code = (
        "from recipes.engines.server import llama_command, serving; import signal\n"
        f"with serving(llama_command({str(gguf)!r}, {port}, 64, 1), {port}, 120):\n"
        "    print('ready', flush=True); signal.pause()\n"
    )
    stage = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert stage.stdout is not None
    while "ready" not in (line := stage.stdout.readline()):
        assert line
    stage.kill()
    stage.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((server.HOST, port)):
                return
        time.sleep(0.1)
    pytest.fail("the server still listens")
