"""Models of other libraries trained on the same batches: a part of `benchmarks/gpu.py`.

The loop is the plainest: bf16 autocast, fused AdamW, clipping. Layers are compiled one by one, as this library does it,
and so are head and loss together, over the logits of all positions, as these models compute them. A row is one document
to them (SDPA without a mask), which is their fastest case.
"""

import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_bench import Bench
from gpu_training import MODELS, Model, make_data, time_training, with_fewer_rows
from torch import Tensor, nn

from torchrecipes.data import Batch
from torchrecipes.training.precision import autocast

NEOBERT, LLAMA, GPT2, _, MOE = MODELS
IGNORED = -100


def run(bench: Bench) -> None:
    if importlib.util.find_spec("transformers") is None:
        bench.note("transformers is not installed: its models were not measured")
    else:
        import transformers

        transformers.logging.set_verbosity_error()
        bench.run("transformers EuroBERT 28 x 768", _measure, NEOBERT, _eurobert)
        bench.run("transformers GPT-2 750M", _measure, GPT2, _gpt2)
        bench.run("transformers Qwen3-MoE as moe/500m, bf16 weights", _measure, MOE, _qwen3_moe)
        bench.run("transformers ModernBERT-base", _measure, NEOBERT, _modernbert)
    if importlib.util.find_spec("torchtitan") is None:
        bench.note("torchtitan is not installed: its Llama was not measured")
    else:
        bench.run("torchtitan Llama 700M", _measure, LLAMA, _torchtitan)


Parts = tuple[nn.Module, Iterable[nn.Module], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def _measure(bench: Bench, spec: Model, make: Callable[[bool, int], Parts]) -> None:
    with_fewer_rows(bench, spec, lambda rows: _train(bench, spec, make, rows))


def _train(bench: Bench, spec: Model, make: Callable[[bool, int], Parts], rows: int) -> None:
    data = make_data(bench, spec, ("compute.compile=false",), rows)
    torch.manual_seed(0)
    with bench.device:
        model, layers, hidden_of, logits_of = make(bench.tiny, data.tokenizer.vocab_size)
    model.to(bench.device, torch.bfloat16 if make is _qwen3_moe else torch.float32).train()
    for layer in layers:
        layer.compile()

    @torch.compile(dynamic=False)
    def loss_of(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = logits_of(hidden).flatten(0, 1).float()
        return F.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=IGNORED)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def backward(batch: Batch, num_targets: int) -> Tensor:
        labels = _labels(batch)
        with autocast(bench.device, torch.bfloat16):
            loss = loss_of(hidden_of(batch.input_ids), labels)
        (loss / num_targets).backward()
        return loss.detach()

    def update(_loss: Tensor) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    flops = None if make is _modernbert else spec  # the others have the shape of ours
    parameters = sum(p.numel() for p in model.parameters())
    time_training(bench, data, backward, update, flops=flops, beside=spec.name, parameters=parameters)


def _labels(batch: Batch) -> Tensor:
    """The label of every position, also of a masked batch."""
    if batch.labels is not None:
        return batch.labels
    labels = torch.full_like(batch.input_ids, IGNORED).flatten()
    # The slots without a target come to lie before the start, which is cut off again.
    used = batch.masked_labels != IGNORED
    labels = torch.cat([labels.new_full((1,), IGNORED), labels])
    labels[torch.where(used, batch.masked_positions + 1, 0)] = batch.masked_labels
    return labels[1:].view_as(batch.input_ids)


def _sizes(tiny: bool, hidden_size: int, layers: int, heads: int, intermediate_size: int) -> dict[str, Any]:
    if tiny:
        hidden_size, layers, heads, intermediate_size = 64, 2, 2, 128
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate_size,
        "attn_implementation": "sdpa",
    }


def _ids(*kinds: str) -> dict[str, int]:
    return {f"{kind}_token_id": 0 for kind in kinds}


def _eurobert(tiny: bool, vocab_size: int) -> Parts:
    from transformers import EuroBertConfig, EuroBertForMaskedLM

    sizes = _sizes(tiny, 768, 28, 12, 2048)
    heads = sizes["num_attention_heads"]
    settings = {"max_position_embeddings": 1024, "tie_word_embeddings": True, **_ids("pad", "bos", "eos", "mask")}
    config = EuroBertConfig(vocab_size=vocab_size, num_key_value_heads=heads, **sizes, **settings)
    model = EuroBertForMaskedLM(config)
    return model, model.model.layers, lambda ids: model.model(ids)[0], model.lm_head


def _modernbert(tiny: bool, vocab_size: int) -> Parts:
    """ModernBERT-base: 22 x 768, every third layer global, the others with a window of 128."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    sizes = _sizes(tiny, 768, 22, 12, 1152)
    config = ModernBertConfig(vocab_size=vocab_size, **sizes, **_ids("pad", "bos", "eos", "cls", "sep"))
    model = ModernBertForMaskedLM(config)
    return model, model.model.layers, lambda ids: model.model(ids)[0], lambda x: model.decoder(model.head(x))


def _gpt2(tiny: bool, vocab_size: int) -> Parts:
    from transformers import GPT2Config, GPT2LMHeadModel

    width, layers, heads = (64, 2, 2) if tiny else (1280, 32, 20)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=1024,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        **_ids("bos", "eos"),
    )
    model = GPT2LMHeadModel(config)
    return model, model.transformer.h, lambda ids: model.transformer(ids)[0], model.lm_head


def _qwen3_moe(tiny: bool, vocab_size: int) -> Parts:
    """Trained with weights in bf16: autocast does not reach its experts, which would compute in fp32 one by one."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        **_sizes(tiny, 768, 32, 12, 2048),
        num_key_value_heads=1 if tiny else 3,
        head_dim=32 if tiny else 64,
        moe_intermediate_size=64 if tiny else 1024,
        num_experts=4 if tiny else 8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=2,
        max_position_embeddings=2048,
        use_cache=False,
        tie_word_embeddings=False,
        **_ids("pad", "bos", "eos"),
    )
    model = Qwen3MoeForCausalLM(config)
    return model, model.model.layers, lambda ids: model.model(ids)[0], model.lm_head


def _torchtitan(tiny: bool, vocab_size: int) -> Parts:
    """Of torchtitan 0.2, the last one that runs with torch 2.11."""
    from torchtitan.models.llama3.model.args import TransformerModelArgs
    from torchtitan.models.llama3.model.model import Transformer

    width, layers, heads = (64, 2, 2) if tiny else (1280, 32, 20)
    sizes = {"dim": width, "n_layers": layers, "n_heads": heads, "vocab_size": vocab_size}
    model = Transformer(TransformerModelArgs(**sizes, multiple_of=128, max_seq_len=2048))
    with torch.no_grad():
        model.init_weights()
    head, model.output = model.output, None
    return nn.ModuleList([model, head]), model.layers.values(), model, head
