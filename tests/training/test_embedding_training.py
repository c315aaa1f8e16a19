"""An embedding model in what prepares a model for training: sharding, compile, averages, checkpoints."""

from types import SimpleNamespace

import pytest
import torch

from tests import ranks
from torchrecipes.checkpoint import CheckpointConfig, Checkpointer
from torchrecipes.data.sources import Document
from torchrecipes.data.tokenizers import train_wordpiece
from torchrecipes.distributed.fsdp import init_on_device, parallelize
from torchrecipes.models import EmbeddingModel, bert, load_embedding_model, meta_embedding_model, save_hf
from torchrecipes.optim import adamw
from torchrecipes.training import ComputeConfig
from torchrecipes.training.ema import EMA
from torchrecipes.training.run import Run
from torchrecipes.training.setup import compile_model, freeze, setup_model

CPU = torch.device("cpu")
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
SETTINGS = {"projection": 12, "learnable_temperature": 0.1}


def build(**keys):
    return EmbeddingModel(bert(**SIZES, max_position_embeddings=32, **keys), **SETTINGS).train()


def loss_of(model, step, mine=slice(None)):
    """The sum of a loss of 8 texts, two of each pair, whose gradient flows through all of them."""
    ids = torch.randint(64, (8, 9), generator=torch.Generator().manual_seed(step))[mine]
    embeddings = model(ids)
    half = len(ids) // 2
    return (embeddings[:half] * embeddings[half:]).sum() - embeddings.pow(4).sum()


def gradients_on_ranks(strategy, compiled):
    rank = torch.distributed.get_rank()
    with torch.device("meta"):
        model = build()
    if compiled:
        compile_model(model, CPU, backend="aot_eager")
    parallelize(model, strategy, CPU, torch.float32)
    init_on_device(model, CPU, 1)
    pairs = [[0, 1, 4, 5], [2, 3, 6, 7]][rank]
    (loss_of(model, 0, pairs) * 2 / 8).backward()
    alone = build()
    alone.init_weights(1)
    (loss_of(alone, 0) / 8).backward()
    expected = dict(alone.named_parameters())
    return max(
        ((p.grad.full_tensor() - expected[name].grad).norm() / (expected[name].grad.norm() + 1e-6)).item()
        for name, p in model.named_parameters()
    )


@pytest.mark.parametrize(("strategy", "compiled"), [("fsdp", False), ("ddp", True)])
def test_gradients_on_two_ranks(strategy, compiled):
    assert max(ranks.call(gradients_on_ranks, strategy, compiled)) < 1e-4


def train(model, optimizer, ema, steps):
    for step in steps:
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()


def test_a_run_resumes_bit_for_bit_with_averages_and_frozen_parts(tmp_path):
    def start():
        torch.manual_seed(0)
        model = build(hidden_dropout_prob=0.1)
        freeze(model, ["encoder.embedding.*", "encoder.blocks.0.*"])
        optimizer = adamw(model, lr=1e-2)
        ema = EMA(model, decay=0.5)
        options = CheckpointConfig(async_save=False)
        state = {"ema": ema}
        return model, optimizer, ema, Checkpointer(tmp_path, options, model=model, optimizer=optimizer, state=state)

    model, optimizer, ema, checkpointer = start()
    before = model.encoder.blocks[0].mlp.up_proj.weight.clone()
    train(model, optimizer, ema, range(3))
    folder = checkpointer.save(3)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    averaged = {name: value.clone() for name, value in ema.averages.items()}
    train(model, optimizer, ema, range(3, 6))
    again, its_optimizer, its_ema, checkpointer = start()
    assert checkpointer.resume() == 3
    train(again, its_optimizer, its_ema, range(3, 6))
    for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert torch.equal(before, again.encoder.blocks[0].mlp.up_proj.weight)
    assert not torch.equal(model.logit_scale, saved["logit_scale"])  # it is trained
    # A checkpoint is a folder of sentence-transformers, and so is that of the averages.
    for place, values in ((folder, saved), (folder / "ema", saved | averaged)):
        loaded = load_embedding_model(place, report=lambda line: None, learnable_temperature=1.0)
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, values[name]), name
        assert (place / "modules.json").is_file() and (place / "1_Pooling" / "config.json").is_file()


def save_on_ranks(folder):
    with torch.device("meta"):
        model = build()
    parallelize(model, "fsdp", CPU, torch.float32)
    init_on_device(model, CPU, 5)
    with Checkpointer(folder, CheckpointConfig(), model=model, optimizer=adamw(model, lr=1e-3)) as checkpointer:
        return str(checkpointer.save(1))


def test_what_two_ranks_save_one_process_loads(tmp_path):
    folder = ranks.call(save_on_ranks, str(tmp_path))[0]
    expected = build()
    expected.init_weights(5)
    found = load_embedding_model(folder, report=lambda line: None, learnable_temperature=1.0).state_dict()
    for name, value in expected.state_dict().items():
        assert torch.equal(found[name], value), name


def test_setup_model_fills_what_the_folder_lacks(tmp_path, capsys):
    tokenizer = train_wordpiece([Document("a few words for a tokenizer " * 3, "here")], vocab_size=64)
    encoder = bert(**SIZES, max_position_embeddings=32, seed=9)
    save_hf(encoder, tmp_path, tokenizer)  # with its language-model head

    def build_model(config, tokenizer):
        return meta_embedding_model(config.init_from, **SETTINGS)

    compute = ComputeConfig(compile=False)
    config = SimpleNamespace(seq_len=32, compute=compute, seed=3, init_from=str(tmp_path), freeze=[])
    run = Run(tmp_path, CPU, rank=0, world_size=1)
    model = setup_model(build_model, config, tokenizer, run)
    assert torch.equal(model.encoder.blocks[1].mlp.up_proj.weight, encoder.blocks[1].mlp.up_proj.weight)
    assert model.temperature.item() == pytest.approx(0.1) and model.projection.weight.std() > 0.05
    shown = capsys.readouterr().out
    assert "projection.weight" in shown and "cls.predictions" in shown  # new, and not used
