"""Every attention backend, forward and backward, and which one the library chooses: a part of `benchmarks/gpu.py`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from gpu_bench import Bench, describe, relative_error, time_ms
from gpu_corpus import row_boundaries
from torch import Tensor
from torch.nn.attention import SDPBackend, restore_flash_attention_impl

from torchrecipes.data.batching.batch import dense_fields, document_fields
from torchrecipes.modules import row_attention
from torchrecipes.modules.attention_backend import (
    AttentionBackend,
    activate_flash_attention_4,
    choose_attention_backend,
    flex_backend,
    masked_backend,
    varlen_backend,
)
from torchrecipes.modules.self_attention import attention

TOKENS = 32_768  # of a case
ROW_LENGTHS = (1024, 4096, 512, 8192)  # the most usual ones first: time may be over before the last
HEADS = ((12, 12, 64), (16, 4, 128))  # queries, keys and values, size
DOCUMENTS = ("lines", "web", "dense")
CHECKED = 64  # queries that are compared with float64
SDPA = {
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


class Case(NamedTuple):
    """Queries, keys, values and the documents of their rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    documents: dict[str, Any]  # document_ids, cu_seqlens, max_seqlen

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape[0], self.q.shape[1]


def run(bench: Bench) -> None:
    lengths = (256,) if bench.tiny else ROW_LENGTHS
    for row_len in lengths:
        for heads in ((2, 2, 16), (4, 2, 16)) if bench.tiny else HEADS:
            for causal in (False, True):
                name = f"rows of {row_len:,}, {heads[0]}/{heads[1]} x {heads[2]}, {'causal' if causal else 'both ways'}"
                bench.run(name, _measure, row_len, heads, causal)


def _measure(bench: Bench, row_len: int, heads: tuple[int, int, int], causal: bool) -> None:
    for kind in DOCUMENTS:
        case = _make(bench, kind, row_len, heads, causal)
        labels = {"row_len": row_len, "heads": f"{heads[0]}/{heads[1]} x {heads[2]}", "causal": causal}
        labels |= {"documents": kind, "count": len(case.documents["cu_seqlens"]) - 1}
        exact = _reference(case)
        try:
            flash_4 = activate_flash_attention_4(bench.device)
        except Exception as error:
            bench.note(f"flash-attn-4 is installed and does not work: {describe(error)}")
            flash_4 = False
        choice = _choose(case)
        if flash_4:
            restore_flash_attention_impl()
        variants = _variants(case, choice, flash_4)
        usable = []
        for name, make in variants.items():
            with _flash_attention_4(bench.device, "FA4" in name), _only(SDPA.get(name)):
                try:
                    figures = _time(bench, case, make, exact, backward=bench.device.type == "cuda" or name != "flex")
                    usable.append(name)
                except Exception as error:
                    if bench.device.type == "cuda":
                        torch.cuda.synchronize()  # raises where the device is lost, which ends the case
                        torch.cuda.empty_cache()
                    figures = {"forward_ms": None, "backward_ms": None, "failure": describe(error)}
            chosen = name == _label(choice, usable, flash_4)
            bench.add(backend=name, chosen=chosen, **labels, **figures)


def _make(bench: Bench, kind: str, row_len: int, heads: tuple[int, int, int], causal: bool) -> Case:
    """Random tensors with the strides that they have in a model, where one product makes all three."""
    rows = 2 if bench.tiny else TOKENS // row_len
    queries, keys, size = heads
    torch.manual_seed(0)
    qkv = torch.randn(rows, row_len, queries + 2 * keys, size, device=bench.device, dtype=torch.bfloat16)
    q, k, v = (x.detach().requires_grad_() for x in qkv.split([queries, keys, keys], dim=2))
    shape = (rows, row_len)
    fields = dense_fields(shape) if kind == "dense" else document_fields(row_boundaries(kind, *shape), shape)
    if kind == "dense":
        fields["cu_seqlens"] = torch.from_numpy(np.arange(rows + 1, dtype=np.int32) * row_len)
    documents = {
        name: fields[name].to(bench.device) if isinstance(fields[name], Tensor) else fields[name]
        for name in ("document_ids", "cu_seqlens", "max_seqlen")
    }
    return Case(q, k, v, causal, documents)


def _choose(case: Case) -> AttentionBackend:
    """What the library takes for such a batch. A batch of dense rows has no boundaries."""
    documents = case.documents
    if documents["document_ids"] is None:
        documents = documents | {"cu_seqlens": None}
    return choose_attention_backend(
        case.shape, **documents, causal=case.causal, device=case.q.device, dtype=case.q.dtype
    )


def _variants(case: Case, choice: AttentionBackend, flash_4: bool) -> dict[str, Callable[[], AttentionBackend]]:
    """Name -> makes the backend, as a forward pass does it once for all layers."""
    device, dtype, causal = case.q.device, case.q.dtype, case.causal
    ids, bounds, longest = case.documents.values()
    dense = ids is None
    # Dense rows with numbers, so that the same compiled kernel serves: the mask is one of documents either way.
    numbers = torch.zeros(case.shape, dtype=torch.int32, device=device) if dense else ids

    def varlen() -> AttentionBackend:
        return varlen_backend(case.shape, bounds, longest, causal=causal, device=device)

    def masked() -> AttentionBackend:
        return masked_backend(case.shape, ids, None, causal, None, 0.0, device, dtype)

    variants: dict[str, Callable[[], AttentionBackend]] = {
        "flex": lambda: flex_backend(case.shape, numbers, causal=causal, device=device)
    }
    if device.type == "cuda":
        variants["varlen"] = varlen
        names = ("sdpa cudnn", "sdpa flash", "sdpa efficient") if dense else ("sdpa efficient",)
        variants |= dict.fromkeys(names, masked)
        if flash_4:
            variants["varlen, FA4"] = varlen
            if dense:
                variants["sdpa, FA4"] = masked
    else:
        variants["sdpa math"] = masked
    if choice.name not in ("flex", "varlen", "sdpa"):  # on a CPU
        variants[choice.name] = lambda: _choose(case)
    return variants


def _label(choice: AttentionBackend, usable: list[str], flash_4: bool) -> str:
    """The name here of what the library chose: of the kernels of SDPA it takes the first that works."""
    if choice.name == "varlen" and flash_4:
        return "varlen, FA4"
    if choice.name != "sdpa":
        return choice.name
    order = [name for kernel in row_attention.ON_CUDA for name, known in SDPA.items() if known == kernel]
    return next((name for name in order if name in usable), "")


@contextmanager
def _only(kernel: SDPBackend | None) -> Iterator[None]:
    """Lets the library's call of `scaled_dot_product_attention` use one kernel only; None: as it likes."""
    kernels = row_attention.ON_CUDA
    if kernel is not None:
        row_attention.ON_CUDA = [kernel]
    try:
        yield
    finally:
        row_attention.ON_CUDA = kernels


@contextmanager
def _flash_attention_4(device: torch.device, wanted: bool) -> Iterator[None]:
    if wanted:
        activate_flash_attention_4(device)
    try:
        yield
    finally:
        if wanted:
            restore_flash_attention_impl()


def _time(
    bench: Bench, case: Case, make: Callable[[], AttentionBackend], exact: "_Exact", backward: bool
) -> dict[str, Any]:
    backend = make()
    inputs = (case.q, case.k, case.v) if backward else tuple(x.detach() for x in (case.q, case.k, case.v))
    out = attention(*inputs, backend=backend)
    errors = [relative_error(out[0, exact.index], exact.out)]
    if backward:
        grad = torch.zeros_like(out)
        grad[0, exact.index] = exact.grad.to(grad.dtype)
        grads = torch.autograd.grad(out, inputs, grad)
        found = (grads[0][0, exact.index], grads[1][0], grads[2][0])
        errors += [relative_error(a, b) for a, b in zip(found, exact.grads, strict=True)]
    grad = torch.randn_like(out)
    kept: list[Tensor] = []

    def forward_pass() -> None:
        kept[:] = [attention(*inputs, backend=backend)]

    def backward_pass() -> None:
        torch.autograd.grad(kept[0], inputs, grad)

    steps = (forward_pass, backward_pass) if backward else (forward_pass,)
    times = time_ms(bench.device, *steps, seconds=0.1)
    (mask_ms,) = time_ms(bench.device, make, seconds=0.02, most=10)
    return {
        "forward_ms": times[0],
        "backward_ms": times[1] if backward else None,
        "mask_ms": mask_ms,  # once per forward pass, for all layers
        "error_to_float64": max(errors),
    }


class _Exact(NamedTuple):
    """In float64: outputs of some queries of the first row, and gradients where only these have one.

    `index` [Q], `out`, `grad` [Q, N, H]; `grads`: of these queries, and of all keys and values of the row.
    """

    index: Tensor
    out: Tensor
    grad: Tensor
    grads: tuple[Tensor, ...]


def _reference(case: Case) -> _Exact:
    row_len, device = case.shape[1], case.q.device
    index = torch.linspace(0, row_len - 1, min(CHECKED, row_len), device=device).long()
    q, k, v = (x[0].detach().double() for x in (case.q, case.k, case.v))
    q = q[index].requires_grad_()
    k, v = k.requires_grad_(), v.requires_grad_()
    repeats = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = torch.einsum("qnh,snh->nqs", q, keys) / q.shape[-1] ** 0.5
    seen = torch.ones(len(index), row_len, dtype=torch.bool, device=device)
    if case.causal:
        seen &= index[:, None] >= torch.arange(row_len, device=device)
    ids = case.documents["document_ids"]
    if ids is not None:
        seen &= ids[0, index][:, None] == ids[0]
    out = torch.einsum("nqs,snh->qnh", scores.masked_fill(~seen, float("-inf")).softmax(-1), values)
    grad = torch.randn_like(out).to(case.q.dtype).double()  # what the kernels get is rounded
    return _Exact(index, out.detach(), grad, torch.autograd.grad(out, (q, k, v), grad))
