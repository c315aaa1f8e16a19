"""The estimate against steps that are really taken, by the count of PyTorch's allocator, and against closed forms."""

import gc
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from torchrecipes import optim
from torchrecipes.cli.run import load_recipe
from torchrecipes.config import Component, load
from torchrecipes.config.catalog import find_recipe
from torchrecipes.data.sources.records import Document
from torchrecipes.data.tokenizers.load import train_wordpiece
from torchrecipes.errors import UserError
from torchrecipes.estimation import is_estimating
from torchrecipes.losses import masked_lm_loss
from torchrecipes.models import bert, neobert, save_hf
from torchrecipes.planning import estimate_run, flops_per_token
from torchrecipes.planning.fake_model import TokenizerStandIn
from torchrecipes.planning.flops import DEVICES
from torchrecipes.planning.memory_estimate import StepEstimate
from torchrecipes.training.activation_checkpointing import apply_activation_checkpointing

TENSORS = ("weights", "optimizer", "gradients", "activations", "loss")  # the parts that the allocator sees
SIZES = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
MLM = load_recipe(find_recipe("mlm_pretrain"))
CAUSAL = load_recipe(find_recipe("causal_pretrain"))


def config_of(*settings, recipe=MLM, model="neobert", **sizes):
    """The recipe's config for a small network."""
    sizes = SIZES | sizes if model in ("neobert", "bert", "qwen3_moe", "llama") else sizes
    overrides = [
        "output_dir=nowhere",
        "data.source.path=nowhere",
        "tokenizer.vocab_size=8192",
        f"model._component_=torchrecipes.models.{model}",
        *(f"model.{name}={size}" for name, size in sizes.items()),
        "seq_len=128",
        "global_batch_size=16",
        "max_steps=10",
        *settings,
    ]
    return load(recipe.Config, None, overrides)


def estimate(*settings, device="h200", recipe=MLM, world_size=1, mfu=0.4, **sizes):
    config = config_of(*settings, recipe=recipe, **sizes)
    return estimate_run(recipe, config, device=device, world_size=world_size, mfu=mfu)


def measured_peak(build, *, dtype, rows, row_len, mode="none", micro_batches=1, optimizer=optim.adamw):
    """Bytes at the peak of two real optimizer steps: every allocation of the CPU's allocator, in order."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = build().train()
        apply_activation_checkpointing(model, mode)
        trained = optimizer(model)
        cu_seqlens = torch.arange(0, rows * row_len + 1, row_len // 4, dtype=torch.int32)
        targets = torch.arange(rows * math.ceil(0.15 * row_len))
        for _ in range(2):
            for _ in range(micro_batches):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                    ids = torch.zeros(rows, row_len, dtype=torch.int64)
                    hidden = model(ids, cu_seqlens=cu_seqlens, max_seqlen=row_len)
                    loss = masked_lm_loss(hidden, model.head, targets, targets)
                loss.backward()
                del hidden, loss
            trained.step()
            trained.zero_grad()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def tensors(found):
    return sum(found["memory"][part] for part in TENSORS)


@pytest.mark.parametrize(
    "family, sizes, settings",
    [
        ("neobert", (128, 3, 4, 256), "compute.precision=bf16"),
        ("bert", (128, 3, 4, 256), "compute.precision=fp32"),
        ("neobert", (256, 6, 4, 688), "compute.precision=bf16 compute.activation_checkpointing=selective"),
        (
            "neobert",
            (256, 6, 4, 688),
            "compute.precision=fp32 compute.activation_checkpointing=full micro_batch_size=8",
        ),
    ],
)
def test_peak_of_real_steps(family, sizes, settings):
    sizes = dict(zip(SIZES, sizes, strict=True))
    # Dropout needs the attention without a kernel; off, both families have the same kernels.
    extra = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family == "bert" else {}
    config = config_of("mlm_probability=0.15", *settings.split(), model=family, **sizes, **extra)
    measured = measured_peak(
        partial({"neobert": neobert, "bert": bert}[family], vocab_size=8192, **sizes, **extra),
        dtype=torch.bfloat16 if config.compute.precision == "bf16" else torch.float32,
        rows=config.micro_batch_size,
        row_len=128,
        mode=config.compute.activation_checkpointing,
        micro_batches=16 // config.micro_batch_size,
    )
    estimated = estimate_run(MLM, config, device="cpu")
    assert tensors(estimated) == pytest.approx(measured, rel=0.15)


def test_parameters_and_time():
    found = estimate("compute.precision=bf16", world_size=8)
    model = neobert(vocab_size=8192, **SIZES)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert found["parameters"]["total"] == found["parameters"]["active"] == count
    assert found["parameters"]["embedding"] == 8192 * 128
    assert found["parameters"]["blocks"] == sum(parameter.numel() for parameter in model.blocks.parameters())
    assert found["strategy"] == "ddp"
    assert found["memory"]["weights"] == 4 * count
    assert found["memory"]["optimizer"] == pytest.approx(8 * count, rel=0.001)
    functions = (MLM.build_model, MLM.build_collator, MLM.compute_loss)
    assert found["flops_per_token"] == flops_per_token(config_of(), TokenizerStandIn(8192), *functions)
    assert found["micro_batch_size"] == 2
    # tokens * FLOPs per token over what eight devices do.
    seconds = 10 * 16 * 128 * found["flops_per_token"] / (0.4 * 989e12 * 8)
    assert found["hours"] == pytest.approx(seconds / 3600)
    assert estimate(world_size=8, mfu=0.2)["hours"] == pytest.approx(seconds / 1800)


@pytest.mark.parametrize("name, bytes_per_parameter", [("adamw", 8), ("adamw_8bit", 2.06), ("adamw_4bit", 1.06)])
def test_optimizer_state(name, bytes_per_parameter):
    found = estimate(f"optimizer._component_=torchrecipes.optim.{name}", device="cpu")
    assert found["memory"]["optimizer"] == pytest.approx(
        bytes_per_parameter * found["parameters"]["total"], rel=0.01, abs=30_000
    )


def test_an_optimizer_class_of_torch():
    found = estimate("optimizer=torch.optim.SGD", "optimizer.lr=0.1")
    assert found["memory"]["optimizer"] == 0


def test_frozen_parameters_have_no_gradient_and_no_state():
    found = estimate("freeze=[embedding.*]")
    assert found["memory"]["optimizer"] == pytest.approx(8 * (found["parameters"]["total"] - 8192 * 128), rel=0.001)


def test_an_offloaded_optimizer_takes_no_memory_of_a_gpu():
    found = estimate("optimizer._component_=torchrecipes.optim.adamw_cpu_offload")
    assert found["memory"]["optimizer"] == 0
    assert found["checkpoint_bytes"] == 12 * found["parameters"]["total"]


def test_model_and_tokenizer_from_a_folder(tmp_path):
    tokenizer = train_wordpiece([Document("one two three four", "here")], vocab_size=320)
    model = bert(vocab_size=tokenizer.vocab_size, **SIZES | {"num_hidden_layers": 2})
    save_hf(model, tmp_path, tokenizer)
    count = sum(parameter.numel() for parameter in model.parameters())
    config = load(
        MLM.Config, None, ["output_dir=x", "data.source.path=x", f"init_from={tmp_path}", "seq_len=128", "max_steps=1"]
    )
    assert estimate_run(MLM, config, device="h200")["parameters"]["total"] == count
    config = config_of()
    config.tokenizer = Component("torchrecipes.data.tokenizers.load_tokenizer", {"path": str(tmp_path)})
    assert estimate_run(MLM, config, device="h200")["parameters"]["embedding"] == tokenizer.vocab_size * 128


def own_tokenizer(source):
    """A user's, of whose size nothing is known before there is text."""


def test_a_tokenizer_of_unknown_size():
    config = config_of()
    config.tokenizer = Component(f"{__name__}.own_tokenizer")
    with pytest.raises(UserError) as error:
        estimate_run(MLM, config, device="h200")
    assert (error.value.code, error.value.key) == ("unknown_vocab_size", "tokenizer._component_")


class Own(nn.Module):
    """A network without blocks, head or config; its embedding and output are one parameter."""

    def __init__(self, vocab_size):
        super().__init__()
        self.embed, self.mix = nn.Embedding(vocab_size, 64), nn.GRU(64, 64, batch_first=True)
        self.out = nn.Linear(64, vocab_size, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(self.mix(self.embed(ids))[0])


def own_loss(model, batch, config):
    logits = model(batch.input_ids).flatten(0, 1)[batch.masked_positions]
    return nn.functional.cross_entropy(logits, batch.masked_labels, reduction="sum"), {}


def test_a_model_of_ones_own_with_tied_weights():
    recipe = SimpleNamespace(
        build_model=lambda _, tokenizer: Own(tokenizer.vocab_size),
        build_collator=MLM.build_collator,
        compute_loss=own_loss,
    )
    found = estimate_run(recipe, config_of("compute.strategy=fsdp"), device="h200", world_size=2)
    model = Own(8192)
    assert found["memory"]["weights"] == 4 * sum(parameter.numel() for parameter in model.parameters()) / 2
    logits = 8 * 128 * 8192 * 2
    assert found["memory"]["gradients"] > logits  # of the logits


def test_a_transformers_model():
    pytest.importorskip("transformers")
    found = estimate(
        "model.model_type=bert", *(f"model.{name}={size}" for name, size in SIZES.items()), model="from_transformers"
    )
    assert found["memory"]["optimizer"] == pytest.approx(8 * found["parameters"]["total"], rel=0.001)


def test_a_mixture_of_experts_is_estimated_with_an_even_load():
    sizes = {"num_key_value_heads": 4, "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
    settings = {"recipe": CAUSAL, "model": "qwen3_moe", "num_hidden_layers": 2} | sizes
    for device in ("h200", "cpu"):
        found = estimate("tokenizer.vocab_size=8192", device=device, **settings)
        assert found["parameters"]["active"] < found["parameters"]["total"]
        # Gate and up of the chosen experts of every token, in two layers.
        assert found["memory"]["activations"] > 2 * 16 * 128 * 2 * 2 * 64 * 2


def test_fully_sharded_state_is_split_over_all_ranks_and_hybrid_within_a_machine():
    by = {
        strategy: estimate(f"compute.strategy={strategy}", world_size=16)["memory"]
        for strategy in ("ddp", "fsdp", "hsdp")
    }
    assert by["fsdp"]["optimizer"] == pytest.approx(by["ddp"]["optimizer"] / 16, rel=0.01)
    assert by["hsdp"]["optimizer"] == pytest.approx(by["ddp"]["optimizer"] / 8, rel=0.01)
    assert by["fsdp"]["weights"] == pytest.approx(by["ddp"]["weights"] / 16, rel=0.001)
    assert by["hsdp"]["weights"] == pytest.approx(by["ddp"]["weights"] / 8, rel=0.001)
    assert 0 < by["fsdp"]["unsharded_parameters"] < by["ddp"]["weights"]
    # Measured: the copies that `fully_shard` computes with are autocast's in bf16, and all weights again in fp32.
    assert by["ddp"].get("unsharded_parameters", 0) == 0
    in_fp32 = estimate("compute.strategy=ddp", "compute.precision=fp32", world_size=16)["memory"]
    assert in_fp32["unsharded_parameters"] == in_fp32["weights"]


def test_gradients_wait_for_the_last_micro_batch_in_whole_or_sharded():
    shared = ("compute.strategy=fsdp", "global_batch_size=64", "micro_batch_size=1")
    waiting, sharded = (
        estimate(*shared, f"compute.reduce_gradients={choice}", world_size=4)["memory"]
        for choice in ("last_micro_batch", "auto")
    )
    assert waiting["gradients"] - sharded["gradients"] == pytest.approx(3 * waiting["weights"])
    assert waiting["total"] > sharded["total"]


def test_checkpointing_keeps_the_inputs_of_blocks():
    kept = {
        mode: estimate("compute.precision=fp32", f"compute.activation_checkpointing={mode}")["memory"]
        for mode in ("none", "selective", "full")
    }
    assert kept["none"]["activations"] > kept["selective"]["activations"] > kept["full"]["activations"]
    # Inputs of three blocks and of the last norm, rotary tables; the norm's and the head's rows.
    inputs = 16 * 128 * 128 * 4
    assert 3 * inputs <= kept["full"]["activations"] < 7 * inputs


def test_the_cpu_keeps_scores_in_bf16_and_a_gpu_does_not():
    scores = 4 * 16 * 128 * 128 * 2  # heads, rows, [S, S] in bf16
    by_layers = {
        (device, layers): estimate("compute.precision=bf16", device=device, num_hidden_layers=layers)["memory"]
        for device in ("cpu", "h200")
        for layers in (3, 13)
    }
    a_layer = {
        device: (by_layers[device, 13]["activations"] - by_layers[device, 3]["activations"]) / 10
        for device in ("cpu", "h200")
    }
    queries_to_outputs = 4 * 16 * 128 * 128 * 2
    assert a_layer["cpu"] > scores + queries_to_outputs
    assert a_layer["h200"] == pytest.approx(a_layer["cpu"] - scores, rel=0.1)


def test_a_gpu_keeps_a_residual_stream_in_bf16():
    """Two tensors a layer in half the bytes; what autocast casts to bf16 for the products is in bf16 already."""
    bf16, fp32 = (
        estimate("compute.precision=bf16", f"compute.residual={residual}", device="h200")["memory"]["activations"]
        for residual in ("auto", "fp32")
    )
    assert fp32 - bf16 >= 3 * 2 * 16 * 128 * 128 * 2


def test_a_model_larger_than_this_machine_is_estimated():
    found = estimate(
        "compute.strategy=fsdp",
        world_size=8,
        hidden_size=8192,
        num_hidden_layers=16,
        num_attention_heads=64,
        intermediate_size=28672,
    )
    assert found["parameters"]["total"] > 15e9
    assert found["memory"]["optimizer"] == pytest.approx(found["parameters"]["total"], rel=0.01)


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    more = partial(
        estimate, "global_batch_size=600", "seq_len=1024", "compute.precision=bf16", device="4090", hidden_size=1024
    )
    auto = more("micro_batch_size=auto")
    largest, room = auto["max_micro_batch_size"], 0.9 * auto["device_bytes"]
    assert auto["micro_batch_size"] == largest
    assert auto["micro_batches"] == 600 // largest
    assert auto["memory"]["total"] <= room
    after = min(rows for rows in range(largest + 1, 601) if 600 % rows == 0)
    larger = more(f"micro_batch_size={after}")
    assert larger["micro_batch_size"] == after
    assert larger["memory"]["total"] > room


def test_no_row_fits():
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 12, "intermediate_size": 11008}
    assert estimate("global_batch_size=1", device="4090", **sizes)["max_micro_batch_size"] is None


def test_steps_by_tokens():
    assert estimate()["steps"] == 10
    assert estimate("max_steps=null", "total_tokens=1M")["steps"] == math.ceil(1e6 / (16 * 128))


def test_disk_of_checkpoints():
    found = estimate("checkpoint.keep_last=2")
    assert found["checkpoint_bytes"] == pytest.approx(12 * found["parameters"]["total"], rel=0.001)
    assert found["kept_bytes"] == 3 * found["checkpoint_bytes"], "while one is written, the two before it exist"


def test_nothing_is_drawn_and_nothing_stays():
    state = torch.get_rng_state()
    functions = (MLM.build_model, MLM.build_collator, MLM.compute_loss)
    trace = StepEstimate(*(config_of(), TokenizerStandIn(8192), *functions), device_type="cuda", dtype=torch.bfloat16)
    assert trace.step(4, accumulate=False) == trace.step(4, accumulate=False)
    assert trace.step(2, accumulate=True).peak < trace.step(16, accumulate=True).peak
    assert torch.equal(torch.get_rng_state(), state)
    assert not is_estimating()


@pytest.mark.parametrize(
    "arguments, key, code",
    [
        ({"device": "h2000"}, "--device", "unknown_name"),
        ({"world_size": 3}, "--world-size", "not_divisible"),
        ({"world_size": 0}, "--world-size", "out_of_range"),
        ({"mfu": 40}, "--mfu", "out_of_range"),
    ],
)
def test_wrong_arguments(arguments, key, code):
    with pytest.raises(UserError) as error:
        estimate(**arguments)
    assert (error.value.key, error.value.code) == (key, code)


# The makers' figures in TFLOP/s: NVIDIA's data sheets, and what Apple says of its GPUs.
TFLOPS = {"h100": 989, "v100": 125, "t4": 65, "m1": 2.6, "m2": 3.6, "m2-max": 13.6, "m2-ultra": 27.2}


def test_the_peaks_of_named_machines_are_the_makers():
    found = {name: next(iter(DEVICES[name].peaks.values())) / 1e12 for name in TFLOPS}
    assert found == pytest.approx(TFLOPS, rel=0.02)
    first = {name: next(iter(DEVICES[name].peaks)) for name in ("h100", "v100", "m2", "laptop")}
    assert first == {"h100": "bf16", "v100": "fp16", "m2": "fp32", "laptop": "fp32"}


def test_a_gpu_without_bf16_is_estimated_in_fp16():
    found = estimate("max_steps=1000", device="t4", mfu=0.5)
    assert found["precision"] == "float16" and found["memory"]["total"] < found["device_bytes"]
    flop = 1000 * found["tokens_per_step"] * found["flops_per_token"]
    assert found["hours"] * 3600 == pytest.approx(flop / (0.5e12 * 65))
    assert estimate("compute.precision=bf16", device="t4")["hours"] is None  # emulated, slowly


def test_apple_gpus_hold_a_mask_and_scores_of_attention():
    """No kernel computes attention there: a layer keeps scores `[rows, heads, S, S]`, which an NVIDIA GPU does not."""
    apple, nvidia = (estimate("compute.precision=fp32", device=name)["memory"] for name in ("m2", "h200"))
    assert apple["activations"] > nvidia["activations"]
