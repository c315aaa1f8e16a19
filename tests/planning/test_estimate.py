"""The estimate against steps that are really taken, by the count of PyTorch's allocator, and against closed forms."""

import gc
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from torchrecipes import optim
from torchrecipes.cli.run import load_recipe
from torchrecipes.config import Component, load
from torchrecipes.config.catalog import find_recipe
from torchrecipes.data.sources.records import Document
from torchrecipes.data.tokenizers.load import train_wordpiece
from torchrecipes.errors import UserError
from torchrecipes.losses import masked_lm_loss
from torchrecipes.models import bert, neobert, save_hf
from torchrecipes.planning.flops import mlm_flops_per_token
from torchrecipes.planning.run_estimate import estimate_run, step_fits
from torchrecipes.training.activation_checkpointing import apply_activation_checkpointing
from torchrecipes.training.run import Run

CPU = torch.device("cpu")
TENSORS = ("weights", "optimizer", "gradients", "activations", "loss")  # what the allocator sees of the memory's parts


def config_of(*settings, model="neobert", **sizes):
    """The recipe's config for a small network."""
    recipe = find_recipe("mlm_pretrain")
    sizes = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256} | sizes
    overrides = [
        "output_dir=nowhere",
        "tokenizer.vocab_size=8192",
        f"model._component_=torchrecipes.models.{model}",
        *(f"model.{name}={size}" for name, size in sizes.items()),
        "seq_len=128",
        "global_batch_size=16",
        "max_steps=10",
        *settings,
    ]
    return load(load_recipe(recipe).Config, "bert/tiny", overrides, recipe=recipe)


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
    "kind, sizes, settings",
    [
        ("neobert", (128, 3, 4, 256), "precision=bf16"),
        ("bert", (128, 3, 4, 256), "precision=fp32"),
        ("neobert", (256, 6, 4, 688), "precision=bf16 activation_checkpointing=selective"),
        ("neobert", (256, 6, 4, 688), "precision=fp32 activation_checkpointing=full micro_batch_size=8"),
    ],
)
def test_the_peak_is_that_of_real_steps(kind, sizes, settings):
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    # Dropout needs the attention without a kernel; off, both families have the same kernels.
    extra = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if kind == "bert" else {}
    config = config_of(*settings.split(), model=kind, **dict(zip(names, sizes, strict=True)), **extra)
    estimated = estimate_run(config, device="cpu")
    build = partial({"neobert": neobert, "bert": bert}[kind], 8192, *sizes, **extra)
    measured = measured_peak(
        build,
        dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
        rows=config.micro_batch_size if config.micro_batch_size < 16 else 16,
        row_len=128,
        mode=config.activation_checkpointing,
        micro_batches=2 if config.micro_batch_size < 16 else 1,
    )
    assert tensors(estimated) == pytest.approx(measured, rel=0.15)


def test_parameters_and_their_shares():
    found = estimate_run(config_of("precision=bf16"), device="h200", world_size=8)
    model = neobert(vocab_size=8192, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert found["parameters"]["total"] == found["parameters"]["active"] == count
    assert found["parameters"]["embedding"] == 8192 * 128
    assert found["parameters"]["blocks"] == sum(parameter.numel() for parameter in model.blocks.parameters())
    assert found["strategy"] == "ddp"
    assert found["memory"]["weights"] == 4 * count
    assert found["memory"]["optimizer"] == pytest.approx(8 * count, rel=0.001)
    assert found["flops_per_token"] == mlm_flops_per_token(model, 128, 0.15)
    assert found["micro_batch_size"] == 2
    # tokens * FLOPs per token over what eight of them do.
    seconds = 10 * 16 * 128 * found["flops_per_token"] / (0.4 * 989e12 * 8)
    assert found["hours"] == pytest.approx(seconds / 3600)
    assert estimate_run(config_of(), device="h200", world_size=8, mfu=0.2)["hours"] == pytest.approx(seconds / 1800)


@pytest.mark.parametrize("name, bytes_per_parameter", [("adamw", 8), ("adamw_8bit", 2.06), ("adamw_4bit", 1.06)])
def test_optimizer_state_by_optimizer(name, bytes_per_parameter):
    found = estimate_run(config_of(f"optimizer._component_=torchrecipes.optim.{name}"), device="cpu")
    assert found["memory"]["optimizer"] == pytest.approx(
        bytes_per_parameter * found["parameters"]["total"], rel=0.01, abs=30_000
    )


def test_an_optimizer_on_the_cpu_takes_nothing_of_a_gpu():
    found = estimate_run(config_of("optimizer._component_=torchrecipes.optim.adamw_cpu_offload"), device="h200")
    assert found["memory"]["optimizer"] == 0
    assert found["checkpoint_bytes"] == 12 * found["parameters"]["total"]


def test_model_and_tokenizer_from_a_folder(tmp_path):
    tokenizer = train_wordpiece([Document("one two three four", "here")], vocab_size=320)
    model = bert(
        vocab_size=tokenizer.vocab_size,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
    )
    save_hf(model, tmp_path, tokenizer)
    count = sum(parameter.numel() for parameter in model.parameters())
    loaded = estimate_run(config_of(f"init_from={tmp_path}"), device="h200")
    assert loaded["parameters"]["total"] == count
    path = f"tokenizer={{_component_: torchrecipes.data.tokenizers.load_tokenizer, path: {tmp_path}}}"
    assert estimate_run(config_of(path), device="h200")["parameters"]["embedding"] == tokenizer.vocab_size * 128


def own_tokenizer(source):
    """A user's, of whose size nothing is known before there is text."""


def test_a_tokenizer_of_unknown_size_is_told():
    config = config_of()
    config.tokenizer = Component(f"{__name__}.own_tokenizer")
    with pytest.raises(UserError, match=r"tokenizer\._component_: .*own_tokenizer takes no vocab_size"):
        estimate_run(config, device="h200")


def test_what_fits_beside_a_model_is_a_question_of_the_free_memory():
    config = config_of("precision=bf16", "async_save=false")
    memory = estimate_run(config, device="cpu")["memory"]
    needed = (memory["total"] - memory["weights"] - memory["process"]) / 0.9
    run = Run(Path("nowhere"), CPU)
    assert step_fits(config, run, int(1.001 * needed))(16)
    too_little = step_fits(config, run, int(0.999 * needed))
    assert not too_little(16)
    assert too_little(8)


def test_fully_sharded_state_is_split_over_all_ranks_and_hybrid_within_a_machine():
    by = {
        strategy: estimate_run(config_of(f"parallel.strategy={strategy}"), device="h200", world_size=16)["memory"]
        for strategy in ("ddp", "fsdp", "hsdp")
    }
    assert by["fsdp"]["optimizer"] == pytest.approx(by["ddp"]["optimizer"] / 16, rel=0.01)
    assert by["hsdp"]["optimizer"] == pytest.approx(by["ddp"]["optimizer"] / 8, rel=0.01)
    assert by["fsdp"]["weights"] == pytest.approx(by["ddp"]["weights"] / 16, rel=0.001)
    assert by["hsdp"]["weights"] == pytest.approx(by["ddp"]["weights"] / 8, rel=0.001)
    assert 0 < by["fsdp"]["gathered"] < by["ddp"]["weights"]
    # Measured: the copies that `fully_shard` computes with are autocast's in bf16, and all weights again in fp32.
    assert "gathered" not in by["ddp"]
    in_fp32 = estimate_run(config_of("parallel.strategy=ddp", "precision=fp32"), device="h200", world_size=16)["memory"]
    assert in_fp32["gathered"] == in_fp32["weights"]


def test_checkpointing_keeps_the_inputs_of_blocks():
    kept = {
        mode: estimate_run(config_of("precision=fp32", f"activation_checkpointing={mode}"), device="h200")["memory"]
        for mode in ("none", "selective", "full")
    }
    assert kept["none"]["activations"] > kept["selective"]["activations"] > kept["full"]["activations"]
    # Inputs of three blocks and of the last norm, rotary tables; the norm's and the head's rows.
    inputs = 16 * 128 * 128 * 4
    assert 3 * inputs <= kept["full"]["activations"] < 7 * inputs


def test_the_cpu_keeps_scores_in_bf16_and_a_gpu_does_not():
    scores = 3 * 16 * 4 * 128 * 128 * 2  # layers, rows, heads, [S, S] in bf16
    found = {kind: estimate_run(config_of("precision=bf16"), device=kind)["memory"] for kind in ("cpu", "h200")}
    assert found["cpu"]["activations"] - found["h200"]["activations"] == pytest.approx(scores, rel=0.5)


def test_a_model_larger_than_this_machine_is_estimated():
    config = config_of(
        "parallel.strategy=fsdp",
        hidden_size=8192,
        num_hidden_layers=16,
        num_attention_heads=64,
        intermediate_size=28672,
    )
    found = estimate_run(config, device="h200", world_size=8)
    assert found["parameters"]["total"] > 15e9
    assert found["memory"]["optimizer"] == pytest.approx(found["parameters"]["total"], rel=0.01)


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    config = partial(config_of, "global_batch_size=600", "seq_len=1024", "precision=bf16", hidden_size=1024)
    auto = estimate_run(config("micro_batch_size=auto"), device="4090")
    largest, room = auto["max_micro_batch_size"], 0.9 * auto["device_bytes"]
    assert auto["micro_batch_size"] == largest
    assert auto["micro_batches"] == 600 // largest
    assert auto["memory"]["total"] <= room
    after = min(rows for rows in range(largest + 1, 601) if 600 % rows == 0)
    more = estimate_run(config(f"micro_batch_size={after}"), device="4090")
    assert more["micro_batch_size"] == after
    assert more["memory"]["total"] > room


def test_what_no_device_can_hold_is_told():
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 12, "intermediate_size": 11008}
    assert estimate_run(config_of("global_batch_size=1", **sizes), device="4090")["max_micro_batch_size"] is None


def test_steps_by_tokens():
    assert estimate_run(config_of(), device="cpu")["steps"] == 10
    by_tokens = config_of("max_steps=null", "total_tokens=1M")
    assert estimate_run(by_tokens, device="cpu")["steps"] == math.ceil(1e6 / (16 * 128))


def test_disk_of_checkpoints():
    found = estimate_run(config_of("keep_last=2"), device="cpu")
    assert found["checkpoint_bytes"] == pytest.approx(12 * found["parameters"]["total"], rel=0.001)
    assert found["kept_bytes"] == 3 * found["checkpoint_bytes"], "while one is written, the two before are there"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"device": "h2000"}, r"--device h2000 .* There are: .*, cpu\. Did you mean 'h200'\?"),
        ({"world_size": 3}, "--world-size 3 .*global_batch_size=16"),
        ({"world_size": 0}, "--world-size 0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        estimate_run(config_of(), **arguments)
