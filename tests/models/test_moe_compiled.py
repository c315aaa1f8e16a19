"""Blocks with experts under torch.compile."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.test_moe_families import FREE, SIZES
from torchrecipes.models import moe, qwen3_moe
from torchrecipes.modules import moe as moe_module
from torchrecipes.training.activation_checkpointing import apply_activation_checkpointing

# Compiled blocks.


@pytest.mark.parametrize("builder", [qwen3_moe, moe])
@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("bf16", [True, False])
def test_compiled_blocks_are_one_graph(builder, mode, bf16, monkeypatch):
    """With the kernels for a GPU: on a CPU, tokens come to their experts in a way that is no graph."""
    monkeypatch.setattr(moe_module, "kernel_device", lambda device: "cuda")
    torch.compiler.reset()
    model = builder(**(FREE if builder is moe else SIZES))

    def gradients(ids):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):  # as torch compiles grouped products
            logits = model.head(model(ids)).flatten(0, 1)
        (F.cross_entropy(logits.float(), ids.flatten()) + model.router_loss / ids.numel()).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    steps = [(torch.arange(64).view(2, 32) * step) % 50 for step in (1, 3, 7)]
    expected = [gradients(ids) for ids in steps]
    apply_activation_checkpointing(model, mode)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = [gradients(ids) for ids in steps]
    for wanted, grads in zip(expected, found, strict=True):
        for name, gradient in grads.items():
            torch.testing.assert_close(
                gradient, wanted[name], atol=(0.02 if bf16 else 1e-4) * wanted[name].abs().max().item(), rtol=0
            )
