"""The dtype of the residual stream, from the config key to every tensor that blocks pass on."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from torchrecipes.config.shared_keys import check_shared_keys
from torchrecipes.errors import UserError
from torchrecipes.estimation import estimating
from torchrecipes.models import bert, gpt2, llama, moe, neobert, qwen3_moe
from torchrecipes.modules import (
    GeluMLP,
    MoE,
    MoEBlock,
    PostNormBlock,
    PreNormBlock,
    RMSNorm,
    SelfAttention,
    SwiGLU,
    choose_attention_backend,
)
from torchrecipes.modules.norm import LayerNorm, rms_norm
from torchrecipes.training import ComputeConfig
from torchrecipes.training.precision import autocast, set_float32_matmul_precision, set_residual_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_key_value_heads": 2, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "neobert": lambda: neobert(**SIZES, intermediate_size=64),
    "bert": lambda: bert(**SIZES, intermediate_size=64),
    "gpt2": lambda: gpt2(**SIZES),
    "llama": lambda: llama(**SIZES, intermediate_size=64),
    "qwen3_moe": lambda: qwen3_moe(**SIZES, **EXPERTS, head_dim=8),
    "moe": lambda: moe(**SIZES, **EXPERTS),
}
IDS = torch.arange(32).view(2, 16)


def stream_dtypes(model: nn.Module) -> set[torch.dtype]:
    """The dtypes of what goes into blocks and out of the model, and of its gradients."""
    found = []

    def see(x):
        found.append(x.dtype)
        x.register_hook(lambda grad: found.append(grad.dtype))

    hooks = [block.register_forward_pre_hook(lambda _, args: see(args[0])) for block in model.blocks]
    with autocast(CPU, torch.bfloat16):
        hidden = model(IDS)
        see(hidden)
        hidden.sum().backward()
    for hook in hooks:
        hook.remove()
    assert len(found) == 6
    return set(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_keeps_its_dtype_through_all_blocks(family):
    model = FAMILIES[family]().train()
    assert stream_dtypes(model) == {torch.float32}
    set_residual_dtype(model, "bf16", torch.bfloat16)
    assert stream_dtypes(model) == {torch.bfloat16}
    with estimating("cuda"):
        set_residual_dtype(model, "fp32", torch.bfloat16)
        assert stream_dtypes(model) == {torch.float32}
        set_residual_dtype(model, "auto", torch.bfloat16)
        assert stream_dtypes(model) == {torch.bfloat16}
    assert model(IDS).dtype == torch.float32  # without autocast


@pytest.fixture
def cuda_autocast():
    """Autocast as on a GPU, on tensors without data: it has other rules than that of the CPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    with torch.no_grad(), FakeTensorMode(), estimating("cuda"):
        yield
    torch.set_autocast_enabled("cuda", False)


@pytest.mark.usefixtures("cuda_autocast")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_autocast_of_a_gpu_keeps_the_dtype_of_the_stream(norm, dtype):
    def parts(mlp):
        return {"self_attn": SelfAttention(16, 2), "mlp": mlp, "attention_norm": norm(16), "mlp_norm": norm(16)}

    with torch.device("meta"):
        blocks = PreNormBlock(**parts(SwiGLU(16, 24))), PostNormBlock(**parts(GeluMLP(16, 24)))
    for block in blocks:
        for module in block.modules():
            for name, x in module._parameters.items():
                if x is not None:
                    module._parameters[name] = torch.empty(x.shape, device="cuda")
        x = torch.empty(2, 8, 16, dtype=dtype, device="cuda")
        backend = choose_attention_backend((2, 8), device=x.device, dtype=torch.bfloat16)
        assert block(x, None, backend).dtype == dtype


def test_experts_and_router_take_a_stream_in_bf16():
    parts = {"self_attn": SelfAttention(16, 2), "attention_norm": RMSNorm(16), "mlp_norm": RMSNorm(16)}
    block = MoEBlock(mlp=MoE(16, 16, 4, 2, shared_intermediate_size=16), **parts)
    x = torch.randn(1, 8, 16, dtype=torch.bfloat16)
    backend = choose_attention_backend((1, 8), device=CPU, dtype=torch.bfloat16)
    with autocast(CPU, torch.bfloat16):
        out, routing = block(x, None, backend)
        logits = block.mlp.gate(x[0])
    assert out.dtype == torch.bfloat16
    assert logits.dtype == routing.aux_loss.dtype == routing.z_loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("code", "model", "residual", "dtype"),
    [
        ("residual_needs_bf16", FAMILIES["neobert"], "bf16", torch.float32),
        ("no_residual_dtype", lambda: nn.Linear(2, 2), "bf16", torch.bfloat16),
        ("no_residual_dtype", lambda: nn.Linear(2, 2), "fp32", torch.bfloat16),
    ],
)
def test_a_dtype_that_the_model_cannot_have_is_refused(code, model, residual, dtype):
    with pytest.raises(UserError) as error:
        set_residual_dtype(model(), residual, dtype)
    assert (error.value.code, error.value.key) == (code, "compute.residual")


def test_any_model_takes_auto():
    set_residual_dtype(nn.Linear(2, 2), "auto", torch.bfloat16)


@pytest.fixture
def no_tf32_afterwards():
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.usefixtures("no_tf32_afterwards")
@pytest.mark.parametrize(
    ("precision", "device", "dtype", "tf32"),
    [
        ("high", CUDA, torch.float32, True),
        ("highest", CUDA, torch.float32, False),
        ("high", CUDA, torch.bfloat16, False),  # what is in fp32 there is to be exact
        ("high", CPU, torch.float32, False),
    ],
)
def test_tf32_is_for_fp32_runs_on_a_gpu(precision, device, dtype, tf32):
    of_cpu = torch.backends.mkldnn.matmul.fp32_precision
    set_float32_matmul_precision(precision, device, dtype)
    assert torch.backends.cuda.matmul.allow_tf32 == tf32
    assert torch.backends.mkldnn.matmul.fp32_precision == of_cpu
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_on_a_gpu_have_the_gradients_of_float64(dtype, compiled):
    torch.manual_seed(0)
    for norm, shape in ((RMSNorm(64), ()), (LayerNorm(64), ()), (HeadNorm(4, 64), (4,))):
        x = torch.randn(100, *shape, 64).to(dtype)
        grad = torch.randn_like(x)
        for parameter in norm.parameters():
            nn.init.normal_(parameter, mean=1.0, std=0.1)
            parameter.data = parameter.data.bfloat16().float()
        expected = results(copy.deepcopy(norm).double(), x.double(), grad.double())
        norm.cuda()
        with torch.autocast("cuda", torch.bfloat16):
            found = results(torch.compile(norm) if compiled else norm, x.cuda(), grad.cuda())
        assert found[0].dtype == found[1].dtype == dtype
        rtol = 2e-2 if dtype == torch.bfloat16 else 1e-4
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.cpu().double(), b, rtol=rtol, atol=rtol * b.abs().max().item())


class HeadNorm(nn.Module):
    """`rms_norm` with a weight for every head."""

    def __init__(self, heads, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, size))

    def forward(self, x):
        return rms_norm(x, self.weight, 1e-5)


def results(norm, x, grad):
    x.requires_grad_()
    y = norm(x)
    return [y.detach(), *torch.autograd.grad(y, (x, *norm.parameters()), grad)]


def test_validate_refuses_a_bf16_stream_in_an_fp32_run():
    (problem,) = check_shared_keys(SimpleNamespace(compute=ComputeConfig(precision="fp32", residual="bf16")))
    assert (problem.key, problem.code) == ("compute.residual", "residual_needs_bf16")
