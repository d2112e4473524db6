"""Every change to a library exists, is needed, and does what its reason says."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading

import pytest
import torch

from nemo_convert import cpu_backend
from nemo_convert.cpu_backend import PATCHES, Patch
from recipes.core.errors import RecipeError
from recipes.core.files import REPO_ROOT

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="active only without CUDA")
ALL = [pytest.param(patch, id=patch.target) for group in PATCHES.values() for patch in group]


@pytest.mark.parametrize("patch", ALL)
def test_target_exists_and_has_a_reason(patch: Patch) -> None:
    module, _, path = patch.target.partition(":")
    holder = importlib.import_module(module)
    for name in path.split("."):
        holder = getattr(holder, name)
    assert len(patch.reason) > 10


def test_a_name_that_is_gone_is_said_loudly() -> None:
    with pytest.raises(RecipeError, match=r"torch\.cuda:no_such_name does not exist"):
        cpu_backend._apply(Patch("torch.cuda:no_such_name", "a test", lambda original: original))


def test_importing_changes_nothing() -> None:
    code = (
        "import torch; before = torch.zeros, torch.Tensor.to, torch.cuda.current_device\n"
        "from nemo_convert import cpu_backend\n"
        "assert before == (torch.zeros, torch.Tensor.to, torch.cuda.current_device)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO_ROOT, check=True)


def test_no_effect_with_cuda_and_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.models.gpt import gpt_layer_specs

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpt_layer_specs, "HAVE_TE", True)
    monkeypatch.setattr(cpu_backend, "_applied", set())
    monkeypatch.setattr(cpu_backend, "_apply", lambda patch: pytest.fail(patch.target))
    cpu_backend.enable()
    config = object()
    assert cpu_backend.adapt_config(config) is config


def test_cuda_without_transformer_engine_has_the_layers_of_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not its patches of CUDA, and weights are made where they stay."""
    cpu_backend.enable("torch", "layers")
    from nemo.collections.llm import LlamaConfig

    shape = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "ffn_hidden_size": 8}
    config, applied = LlamaConfig(**shape), list[Patch]()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpu_backend, "_applied", set())
    monkeypatch.setattr(cpu_backend, "_apply", applied.append)
    cpu_backend.enable()
    assert applied == PATCHES["layers"]
    adapted = cpu_backend.adapt_config(config, training=True)
    assert adapted.transformer_layer_spec is cpu_backend.training_block_spec
    assert adapted.apply_rope_fusion is False
    assert adapted.use_cpu_initialization is False


def test_only_this_thread_computes_with_several() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    cpu_backend.compute_in_this_thread()
    found = list[int]()
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()
    here = torch.get_num_threads()
    torch.set_num_threads(before)
    assert (here, found) == (2, [1])


@needs_no_cuda
def test_tensors_meant_for_cuda_are_made_on_the_cpu() -> None:
    cpu_backend.enable("torch")
    assert torch.tensor([1.0], device="cuda").device.type == "cpu"
    assert torch.zeros(2, device="cuda", pin_memory=True).device.type == "cpu"
    assert torch.ones(2).to("cuda", non_blocking=True).device.type == "cpu"
    assert torch.ones(2).to(torch.bfloat16).dtype == torch.bfloat16
    assert torch.ones(2).cuda().device.type == "cpu"
    assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.Event().record()
        torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() == 0


@needs_no_cuda
def test_random_state_is_saved_and_restored() -> None:
    cpu_backend.enable("torch", "megatron")
    from megatron.core.tensor_parallel import random as tracker

    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    tracker._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    assert torch.equal(tracker._get_cuda_rng_state(), torch.get_rng_state())
    torch.cuda.manual_seed(5)
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(5)))


@needs_no_cuda
def test_adam_keeps_its_steps_with_the_group_and_goes_on() -> None:
    cpu_backend.enable("layers")
    from torch.optim import AdamW, adamw

    weights = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    ours, plain = AdamW(weights[:1]), adamw.AdamW(weights[1:])
    for number in range(4):
        for weight in weights:
            weight.grad = torch.tensor([1.0, -2.0, 0.5, 0.1, 3.0]) / (1 + number)
        ours.step()
        plain.step()
        assert "step" not in ours.state[weights[0]]
        assert ours.param_groups[0]["step"] == number + 1
        saved, ours = ours.state_dict(), AdamW(weights[:1])
        ours.load_state_dict(saved)
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-7)


@needs_no_cuda
def test_fused_attention_equals_megatrons() -> None:
    """Same output as the unfused attention that it replaces, with grouped queries."""
    cpu_backend.enable("torch", "megatron")
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_convert import nemo

    nemo.initialize(nemo.Parallelism())
    config = TransformerConfig(
        num_layers=1,
        hidden_size=24,
        num_attention_heads=6,
        num_query_groups=2,
        kv_channels=4,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
    )
    settings = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self"}
    query = torch.randn(9, 2, 6, 4)
    key, value = torch.randn(2, 9, 2, 2, 4)
    mask = torch.ones(9, 9, dtype=torch.bool).triu(1)[None, None]
    expected = DotProductAttention(config, **settings)(query, key, value, mask)
    found = cpu_backend._sdpa_attention()(config, **settings)(query, key, value, mask)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_no_cuda
def test_config_check_keeps_what_a_gpu_wants() -> None:
    cpu_backend.enable()
    from nemo.collections.llm import LlamaConfig

    shape = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "ffn_hidden_size": 8}
    config = LlamaConfig(**shape)
    assert config.apply_rope_fusion is True
    adapted = cpu_backend.adapt_config(config)
    assert adapted.apply_rope_fusion is False
    assert adapted.use_cpu_initialization is True
    assert "use_cpu_initialization" not in repr(config.__io__)


@needs_no_cuda
def test_seed_reaches_megatrons_generators() -> None:
    cpu_backend.enable()
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
    from nemo.lightning import megatron_init

    from nemo_convert import nemo

    nemo.initialize(nemo.Parallelism())
    draws = []
    for _ in range(2):
        megatron_init._set_random_seed(77)
        with get_cuda_rng_tracker().fork():
            draws.append(torch.rand(3))
    assert torch.equal(*draws)


@needs_no_cuda
def test_modelopt_can_narrow_a_norm() -> None:
    cpu_backend.enable()
    from modelopt.torch.nas.registry import DMRegistry

    assert torch.nn.RMSNorm in DMRegistry


@needs_no_cuda
def test_loading_needs_no_device() -> None:
    cpu_backend.enable()
    from nemo.lightning.io import pl

    checkpoint = {"x": torch.ones(1)}
    assert pl._fix_tensors_device(checkpoint) is checkpoint
