import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchrecipes.errors import UserError
from torchrecipes.models import bert, neobert
from torchrecipes.training.activation_checkpointing import apply_activation_checkpointing, oom_hint

TOKENS = torch.arange(128).reshape(4, 32) % 61
DOCUMENTS = torch.tensor([0, 10, 32, 64, 70, 96, 128], dtype=torch.int32)
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
MODELS = {
    "neobert": partial(neobert, vocab_size=64, **SIZES),
    "bert": partial(bert, vocab_size=64, **SIZES, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1),
}
MODES = ("none", "selective", "full")


class Ledger(TorchDispatchMode):
    """Counts operations, and knows which of the tensors that they made are still in memory."""

    def __init__(self):
        super().__init__()
        self.calls, self.made = Counter(), {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        self.calls[operation.overloadpacket.__name__] += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[StorageWeakRef(storage)] = storage.nbytes()
        return out

    def alive(self, model: nn.Module) -> int:
        """Bytes, without those of the model's own weights."""
        weights = {StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()}
        made = self.made.items()
        return sum(size for storage, size in made if not storage.expired() and storage not in weights)


def train_step(name: str, mode: str, bf16: bool = False, backend: object = None, forwards: int = 1):
    """Matrix products, attention kernels, bytes that wait for the backward pass, gradients."""
    model = MODELS[name]().train()
    apply_activation_checkpointing(model, mode)
    if backend:
        for block in model.blocks:
            block.compile(backend=backend, fullgraph=True)
    torch.manual_seed(0)  # of the dropout
    with nullcontext() if backend else Ledger() as ledger:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = sum(model(TOKENS, cu_seqlens=DOCUMENTS, max_seqlen=32) for _ in range(forwards))
        kept = ledger.alive(model) if ledger else None
        hidden.float().pow(2).sum().backward()
    calls = ledger.calls if ledger else Counter()
    products, kernels = calls["mm"] + calls["addmm"], calls["_scaled_dot_product_flash_attention_for_cpu"]
    return products, kernels, kept, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def equal(gradients, others):
    return all(torch.equal(gradient, other) for gradient, other in zip(gradients, others, strict=True))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_less_is_kept_and_the_gradients_are_the_same(name, bf16):
    products, kernels, kept, gradients = zip(*(train_step(name, mode, bf16) for mode in MODES), strict=True)
    none, selective, full = range(3)
    assert products[none] == products[selective] < products[full]
    assert kept[none] > 1.5 * kept[selective] > 1.5 * 1.5 * kept[full]
    assert equal(gradients[none], gradients[selective])
    assert equal(gradients[none], gradients[full])
    if name == "neobert" and not bf16:
        assert kernels == (2, 2, 4)


def test_the_page_says_what_a_layer_keeps():
    page = (Path(__file__).parents[2] / "docs/precision-and-memory.md").read_text(encoding="utf-8")
    kept = {}
    for mode in MODES:
        for layers in (1, 2):
            model = neobert(vocab_size=64, num_hidden_layers=layers)  # the sizes of the paper
            apply_activation_checkpointing(model, mode)
            with Ledger() as ledger:
                hidden = model(TOKENS)
                kept[mode, layers] = ledger.alive(model) / (4 * TOKENS.numel() * hidden.shape[-1])
        assert f"| `{mode}` | {kept[mode, 2] - kept[mode, 1]:.1f} |" in page


def test_parameter_names_stay():
    model = MODELS["neobert"]()
    names = list(model.state_dict())
    apply_activation_checkpointing(model, "selective")
    assert list(model.state_dict()) == names


def test_two_forward_passes_in_one_autocast():
    """As a contrastive loss does it. The weights are cast twice, so their two gradients are not added up in bf16."""
    expected = train_step("neobert", "none", bf16=True, forwards=2)[-1]
    for gradient, other in zip(train_step("neobert", "selective", bf16=True, forwards=2)[-1], expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0.02, atol=0.02 * other.abs().max().item())


def compiler(calls: Counter):
    def count(graph, _inputs):
        calls.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition)


@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
def test_compiled_blocks_are_recomputed_as_asked():
    products, gradients = {}, {}
    for mode in MODES:
        torch.compiler.reset()
        calls = Counter()
        gradients[mode] = train_step("neobert", mode, backend=compiler(calls))[-1]
        products[mode] = calls["aten.mm.default"]
    assert products["none"] == products["selective"] < products["full"]
    assert equal(gradients["none"], gradients["selective"])
    assert equal(gradients["none"], gradients["full"])


def test_unknown_mode_names_the_choices():
    with pytest.raises(UserError) as error:
        apply_activation_checkpointing(nn.Linear(2, 2), "some")
    assert error.value.code == "unknown_name" and "none, full, selective" in str(error.value)


@pytest.mark.parametrize(("rows", "advice"), [(8, "micro_batch_size=4"), (1, "smaller seq_len")])
def test_out_of_memory_names_the_setting_to_lower(rows, advice):
    with pytest.raises(UserError) as error, oom_hint(rows):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert error.value.code == "out_of_memory" and advice in error.value.hint


def test_other_errors_pass():
    with pytest.raises(KeyError), oom_hint(8):
        raise KeyError("x")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_used_again_without_new_pages():
    script = """
import resource, sys, torch
from torchrecipes.training.activation_checkpointing import tune_malloc
if sys.argv[1] == "keep":
    assert tune_malloc()
for _ in range(30):  # the heap settles
    torch.ones(64 * 2**18)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(64 * 2**18)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {
        way: int(subprocess.run([sys.executable, "-c", script, way], capture_output=True, text=True, check=True).stdout)
        for way in ("keep", "give back")
    }
    assert faults["keep"] < 100 < faults["give back"]
