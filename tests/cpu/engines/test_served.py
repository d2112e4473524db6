"""Tests the evaluation of served models: OpenVINO in this process, llama.cpp as a server."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
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
from recipes.core.run_state import InputRef, request_of
from recipes.core.stage import Input
from recipes.core.stage_process import start_command
from recipes.core.worker import run_stage
from recipes.data.token_sequences import TextSequences
from recipes.engines import served, served_lm, server
from recipes.engines.results import EngineResult
from recipes.engines.server import free_port, llama_command, serving
from recipes.engines.settings import BuildEngineConfig, EvaluateServedConfig
from recipes.evaluation import packed_lm
from recipes.evaluation.harness_tasks import answer, load_tasks
from recipes.evaluation.predictions import TEACHER, Predictor
from recipes.evaluation.results import ServedResult
from recipes.evaluation.text_quality import score
from recipes.stages import build_engine, evaluate_served
from tests.support.launcher import write_program
from tests.support.manifests import as_input, bare_manifest
from tests.support.runs import make_artifact_folder
from tests.unit.engines.test_tensorrt_llm import API

LENGTH = 255
"""Maximum tokens of a prompt with its answer: the tiny model's 256 positions minus 1."""
LIMIT = 3  # items of a task that are evaluated


@pytest.fixture(scope="module")
def gguf(odd_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of ``odd_llama`` with float32 weights, which are the model's exact weights."""
    file = tmp_path_factory.mktemp("gguf") / FILE
    write(odd_llama, file, "f32")
    return file


@pytest.fixture(scope="module")
def llama(odd_llama: Path, gguf: Path) -> Iterator[served_lm.LlamaCppLM]:
    """lm-eval's client of a running llama.cpp server."""
    port = free_port()
    # The server refuses a prompt that fills its context, so the context has one more position.
    command = llama_command(gguf, port, context=LENGTH + 1, threads=1)
    with serving(command, port, start_seconds=120) as address:
        yield served_lm.LlamaCppLM(address, odd_llama, LENGTH)


@pytest.fixture(scope="module")
def student(odd_llama: Path) -> packed_lm.PackedLM:
    """``odd_llama`` in transformers, with the class that evaluates students."""
    return packed_model(odd_llama)


def packed_model(folder: Path) -> packed_lm.PackedLM:
    """Loads a Hugging Face folder as the student is loaded in ``evaluate_served``."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_causal_lm(folder)
    return packed_lm.PackedLM(
        model, tokenizer, pack_tokens=600, progress=lambda done, total: None, max_length=LENGTH
    )


def child_processes() -> set[int]:
    """Returns the process ids of this process's children that have not ended."""
    children = psutil.Process().children()
    return {child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE}


def test_llama_cpp_gives_the_log_likelihoods_of_transformers(
    llama: served_lm.LlamaCppLM, student: packed_lm.PackedLM
) -> None:
    """Includes truncated contexts. Responses also say which continuations are greedy."""
    for task in load_tasks(["sciq", "lambada_openai"], "pypi", {"sciq": 1}):
        expected, answers = (answer(lm, task, LIMIT, seed=1) for lm in (student, llama))
        for pair in zip(answers, expected, strict=True):
            assert len({(item.id, item.hash) for item in pair}) == 1  # both are the same item
            responses = (torch.tensor(item.response).double().flatten() for item in pair)
            torch.testing.assert_close(*responses, rtol=1e-3, atol=0.02)
    with pytest.raises(RecipeError, match="256 tokens"):
        llama._loglikelihood_tokens([(None, [1], [2] * (LENGTH + 1))])  # too long
    context = llama.tok_encode("The history of the")
    likeliest = student.model(torch.tensor([context])).logits[0, -1].argmax().item()
    other = (likeliest + 1) % 293  # the vocabulary has 293 tokens
    for token in (likeliest, other):
        _, is_likeliest = llama.token_score(context, token)
        assert is_likeliest == (token == likeliest)


def test_llama_cpp_gives_the_losses_of_transformers(
    llama: served_lm.LlamaCppLM, student: packed_lm.PackedLM, tmp_path: Path
) -> None:
    """The text includes the token that ends documents, at which a server would stop."""
    end = student.tokenizer.eos_token_id
    tokens = torch.randint(3, 290, (2, 24), generator=torch.Generator().manual_seed(0))
    tokens[0, 11] = end
    text = TextSequences.of(tokens, end)
    assert not text.prediction_mask.all()  # the token after ``end`` is not predicted
    log = MetricsLog(tmp_path / "metrics")
    expected = score({TEACHER: Predictor.of(student.model)}, text, log)[TEACHER].losses
    assert llama.losses(text) == pytest.approx(expected, rel=1e-3)
    # The losses of the two sequences differ, so returning them in the wrong order would fail.
    assert expected[0] != pytest.approx(expected[1], rel=1e-3)


def test_llama_cpp_generates_the_text_of_transformers(
    llama: served_lm.LlamaCppLM, student: packed_lm.PackedLM, odd_llama: Path, tmp_path: Path
) -> None:
    """Compares texts without, then with a repetition penalty in the student's generation config.

    Both use the same server, because the client sends the penalty with each request. The client
    also reports progress after each text, because the watchdog stops a stage without progress.
    """
    settings = {"until": ["."], "max_gen_toks": 12, "do_sample": False}
    prompts = ("The history of the", "A river is a")
    instances = [Instance("generate_until", {}, (p, settings), n) for n, p in enumerate(prompts)]
    expected = student.generate_until(instances)
    assert llama.generate_until(instances) == expected
    assert all(expected)  # no text is empty
    folder = shutil.copytree(odd_llama, tmp_path / "penalty")
    add_generation_settings(folder, repetition_penalty=1.9)
    penalized_student = packed_model(folder)
    address = llama.base_url.removesuffix("/v1/completions")
    client, reports = served_lm.LlamaCppLM(address, folder, LENGTH), []
    client.progress = lambda done, total: reports.append((done, total))
    penalized_texts = client.generate_until(instances)
    assert penalized_texts == penalized_student.generate_until(instances)
    assert penalized_texts != expected
    assert reports == [(1, 2), (2, 2)]


def test_the_client_of_trtllm_serve_uses_only_what_that_server_has(
    gguf: Path,
    student: packed_lm.PackedLM,
    odd_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fake ``trtllm-serve`` records its arguments and starts llama.cpp's server.

    Both servers have the same protocol. ``API`` lists the options, routes and fields that occur in
    TensorRT-LLM's source.
    """
    # The port is the last argument of ``trtllm-serve``, which is "${!#}" in bash. 99999 is a
    # placeholder, because ``llama_command`` takes the port as a number.
    llama_words = llama_command(gguf, 99999, context=LENGTH + 1, threads=1)
    start_llama = shlex.join(llama_words).replace("99999", "${!#}")
    write_program(
        tmp_path / "bin" / "trtllm-serve", f'echo "$@" >{tmp_path}/arguments; exec {start_llama}'
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setattr(served, "require_backend", lambda _: None)
    requested_paths: list[str] = []
    for method in ("get", "post"):
        send = getattr(requests, method)

        def record(url: str, *args: Any, _send: Any = send, **kwargs: Any) -> Any:
            requested_paths.append(urlsplit(url).path)
            return _send(url, *args, **kwargs)

        monkeypatch.setattr(requests, method, record)
    settings = {"until": ["."], "max_new_tokens": 12, "do_sample": False, "temperature": 1.0}
    request = Instance("generate_until", {}, ("The history of the", settings), 0)
    artifact = as_input(tmp_path / "engine", "engine", EngineResult("tensorrt_llm", "bf16", 1, 1))
    artifact.manifest.config["tensor_parallel_size"] = 1
    with served.served_lm(config(), artifact, odd_llama, LENGTH) as client:
        assert client.generate_until([request]) == student.generate_until([request])
    assert isinstance(client, served_lm.ServedLM)
    assert client.timeout == served_lm.REQUEST_SECONDS
    assert {*requested_paths} <= {*API["routes of trtllm-serve"]["routes"]}
    # The arguments are the engine, then pairs of an option and its value.
    options = (tmp_path / "arguments").read_text().split()[1::2]
    assert {"--host", "--port"} < {*options} <= {*API["trtllm-serve"]["options"]}
    client.penalty = client.penalty_request(1.9)
    payload = client._create_payload([[1]], generate=True, gen_kwargs=dict(settings))
    assert payload["repetition_penalty"] == 1.9
    assert (payload["max_tokens"], payload["temperature"]) == (12, 0)
    assert payload.keys() <= {*API["requests of trtllm-serve"]["request"]}


def test_prompt_limits_come_from_the_build_settings_of_an_engine() -> None:
    """Without them, an engine would refuse a long prompt or shorten answers, after hours."""
    limits = ("max_seq_len", "max_input_len", "max_num_tokens")
    unlimited: dict[str, Any] = dict.fromkeys(limits)
    assert served.engine_limits(unlimited) == []
    assert served.engine_limits(unlimited | {"max_seq_len": 2048}) == [2047]
    all_set = dict(zip(limits, (2048, 1024, 512), strict=True))
    assert served.engine_limits(all_set) == [2047, 1024, 512]


def add_generation_settings(folder: Path, **settings: Any) -> None:
    """Adds settings to ``generation_config.json`` in a Hugging Face folder."""
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_generation_settings_that_a_server_lacks_are_refused(
    even_llama: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(even_llama, tmp_path / "student")
    names = ("encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "no_repeat_ngram_size")
    add_generation_settings(folder, **dict.fromkeys(names, 3))
    inputs, out = gguf_inputs(tmp_path, folder, "f16"), make_artifact_folder(tmp_path, "stage")
    with pytest.raises(RecipeError, match=", ".join(names)):
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
        # A response has [log-likelihood, is greedy] for each choice. The first choice is compared.
        gaps = [s["served"]["response"][0][0] - s["student"]["response"][0][0] for s in samples]
        largest_gap[precision] = max(map(abs, gaps))
        likelihoods = served_scores.tasks["piqa"].answers  # mean log-likelihood of right answers
        assert likelihoods.difference.value == pytest.approx(
            likelihoods.served.value - likelihoods.student.value
        )
    assert largest_gap["fp32"] < 1e-3
    assert largest_gap["int4"] > 0.05


def config(**settings: Any) -> EvaluateServedConfig:
    defaults: dict[str, Any] = {"tasks": ["sciq"], "limit": LIMIT, "threads": 1}
    return EvaluateServedConfig("evaluate_served", **defaults | settings)


def gguf_inputs(root: Path, folder: Path, weight_type: str) -> dict[str, Input]:
    """Writes a GGUF file of the student in ``folder``; returns inputs of ``evaluate_served``."""
    file = root / "file" / FILE
    file.parent.mkdir()
    result = write(folder, file, weight_type)
    checkpoint = as_input(root / "checkpoint", "checkpoint_hf", artifact=folder)
    return {
        "checkpoint": checkpoint,
        "artifact": as_input(root / "artifact", "gguf", result, file.parent),
    }


Comparison = tuple[dict[str, Input], ServedResult]  # inputs of a stage and its result


@pytest.fixture(scope="module")
def compared(even_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Inputs of ``evaluate_served`` with a q8_0 file, and its result."""
    root, children_before = tmp_path_factory.mktemp("compared"), child_processes()
    inputs = gguf_inputs(root, even_llama, "q8_0")
    result = evaluate_served.run(config(), inputs, make_artifact_folder(root, "stage")).result
    assert child_processes() <= children_before
    return inputs, result


def test_a_gguf_file_is_compared_with_its_student(compared: Comparison) -> None:
    _, result = compared
    assert (result.server, result.precision, result.text) == ("llama_cpp", "q8_0", None)
    difference = result.tasks["sciq"].answers.difference  # of mean log-likelihoods
    assert 0 < abs(difference.value) < 1  # quantization changes these, but only a little
    assert difference.low < difference.value < difference.high


def test_the_student_in_bfloat16_keeps_the_frequencies_of_rope_in_float32(
    even_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_tasks, students = served.answer_tasks, []

    def record(cfg: Any, name: str, lm: packed_lm.PackedLM, *args: Any) -> Any:
        students.append(lm.model)
        return answer_tasks(cfg, name, lm, *args)

    monkeypatch.setattr(served, "answer_tasks", record)
    inputs, out = gguf_inputs(tmp_path, even_llama, "f16"), make_artifact_folder(tmp_path, "stage")
    evaluate_served.run(config(precision="bf16-mixed", limit=1), inputs, out)
    assert students[0].lm_head.weight.dtype == torch.bfloat16
    # In bfloat16, a frequency is off by up to 0.2 %, and the angle's error grows with the position.
    assert students[0].model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_context_of_llama_cpp_holds_a_sequence_of_text(
    even_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Path, port: int, context: int, threads: int) -> list[str]:
        raise InterruptedError(f"context {context}")

    monkeypatch.setattr(served, "llama_command", refuse)
    inputs, out = gguf_inputs(tmp_path, even_llama, "f16"), make_artifact_folder(tmp_path, "stage")
    text = TextSequences.of(torch.ones(1, 128, dtype=torch.long), 0)
    monkeypatch.setattr(served, "_heldout_text", lambda cfg, inputs: text)
    with pytest.raises(InterruptedError, match="context 128"):
        evaluate_served.run(config(max_length=64, seq_length=128), inputs, out)


def test_a_killed_stage_gives_the_same_result_after_a_restart(
    compared: Comparison, tmp_path: Path
) -> None:
    inputs, uninterrupted = compared
    stage = tmp_path / "stage"
    for item in inputs.values():
        write_manifest(item.directory, item.manifest)
    references = {name: InputRef.of(item.directory) for name, item in inputs.items()}
    request_file = request_of("evaluate_served", config(), references).write(stage)
    command = start_command(evaluate_served.__name__, request_file, 1, sys.executable)
    process = subprocess.Popen(command, start_new_session=True)
    while not (stage / METRICS).exists():  # written while the model is served
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert read_manifest(stage) is None
    # Restarts the stage in this process.
    run_stage(evaluate_served.run, EvaluateServedConfig, evaluate_served.STAGE.kind, stage)
    manifest = read_manifest(stage)
    assert manifest is not None
    assert manifest.result(ServedResult).tasks == uninterrupted.tasks


@pytest.mark.parametrize("problem", ["missing", "damaged", "killed"])
def test_a_server_failure_is_reported_and_no_process_remains(
    even_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    children_before, inputs = child_processes(), gguf_inputs(tmp_path, even_llama, "f16")
    messages = {
        "missing": "llama.cpp's server is missing",
        "damaged": "did not start",
        "killed": "ended during a request: killed by SIGKILL",
    }
    if problem == "missing":
        monkeypatch.setattr(server, "has_llama_server", lambda: False)
    elif problem == "damaged":
        # A GGUF file starts with these four letters; the zeros are not a valid header.
        (inputs["artifact"].artifact / FILE).write_bytes(b"GGUF" + bytes(100))
    else:
        token_score, scored_tokens = served_lm.LlamaCppLM.token_score, []

        def kill_server_at_token_5(self: Any, context: list[int], token: int) -> tuple[float, bool]:
            scored_tokens.append(token)
            if len(scored_tokens) == 5:
                for pid in child_processes() - children_before:
                    os.kill(pid, signal.SIGKILL)
            return token_score(self, context, token)

        monkeypatch.setattr(served_lm.LlamaCppLM, "token_score", kill_server_at_token_5)
    with pytest.raises(RecipeError, match=messages[problem]):
        evaluate_served.run(config(), inputs, make_artifact_folder(tmp_path, "stage"))
    assert child_processes() <= children_before


def test_a_server_stops_if_its_stage_is_killed(gguf: Path) -> None:
    """Kills the stage with SIGKILL, after which the stage itself cannot stop the server."""
    port = free_port()
    code = (
        "from recipes.engines.server import llama_command, serving; import signal\n"
        f"with serving(llama_command({str(gguf)!r}, {port}, 64, 1), {port}, 120):\n"
        "    print('ready', flush=True); signal.pause()\n"
    )
    stage = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert stage.stdout is not None
    while "ready" not in (line := stage.stdout.readline()):
        assert line  # an empty line means that the stage has ended
    [llama_server] = psutil.Process(stage.pid).children()
    stage.kill()
    stage.wait()
    llama_server.wait(timeout=20)  # raises an error if the server still runs
