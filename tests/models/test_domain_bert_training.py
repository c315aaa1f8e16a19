"""DomainBERT in training: checkpoints, ranks, activation checkpointing, half precision."""

from types import SimpleNamespace

import pytest
import torch

from tests import ranks
from torchrecipes.checkpoint import CheckpointConfig, Checkpointer
from torchrecipes.distributed.fsdp import init_on_device, parallelize, set_grad_sync
from torchrecipes.losses import document_class_loss, masked_lm_loss
from torchrecipes.models import domain_bert, load_hf, load_hf_weights, meta_model_from_hf
from torchrecipes.modules import factored_type_table
from torchrecipes.optim import adamw
from torchrecipes.planning import flops_per_token
from torchrecipes.training.activation_checkpointing import apply_activation_checkpointing
from torchrecipes.training.ema import EMA

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "num_suffixes": 7,
    "suffix_embedding_size": 5,
    "initializer_range": 0.2,
}
ROWS, CPU = 4, torch.device("cpu")


def batch(step, rows=slice(None)):
    """Some rows of a step, with masked characters, and a class in each row but one."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(5, 43, (ROWS, 16), generator=generator)
    types = torch.randint(0, 28, (ROWS, 16), generator=generator)
    labels = torch.randint(0, 7, (ROWS,), generator=generator)
    labels[step % ROWS] = -100
    weights = torch.rand(ROWS, generator=generator) * 5
    masked = torch.stack([torch.randperm(16, generator=generator)[:4] for _ in range(ROWS)])
    ids, types, labels, weights, masked = (tensor[rows] for tensor in (ids, types, labels, weights, masked))
    positions = (masked + 16 * torch.arange(len(ids))[:, None]).flatten()
    targets = ids.flatten()[positions]
    ids = ids.flatten().index_fill(0, positions, 4).view_as(ids)
    return SimpleNamespace(
        **{"input_ids": ids, "token_type_ids": types, "masked_positions": positions, "masked_labels": targets},
        **{"class_positions": 16 * torch.arange(len(ids)), "class_labels": labels, "class_weights": weights},
    )


def loss_of(model, batch):
    hidden = model(batch.input_ids, token_type_ids=batch.token_type_ids)
    class_loss, _ = document_class_loss(hidden, model, batch)
    return masked_lm_loss(hidden, model.head, batch.masked_positions, batch.masked_labels) + class_loss


def losses_of_ranks(strategy, rank=None):
    """Losses of three steps, over all ranks."""
    rank, world_size = (0, 1) if rank is None else (torch.distributed.get_rank(), torch.distributed.get_world_size())
    with torch.device("meta"):
        model = domain_bert(**SIZES)
    apply_activation_checkpointing(model, "full")
    parallelize(model, strategy, CPU, torch.float32)
    init_on_device(model, CPU, 3)
    optimizer, losses = adamw(model, lr=1e-2), []
    for step in range(3):
        parts = [batch(step, slice(row, row + 1)) for row in range(rank, ROWS, world_size)]
        total = torch.zeros(())
        for part in parts:
            set_grad_sync(model, last=part is parts[-1])
            loss = loss_of(model, part) / (4 * ROWS)
            (loss * world_size).backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        if world_size > 1:
            torch.distributed.all_reduce(total)
        losses.append(total.item())
    return losses


@pytest.fixture(scope="module")
def one_process():
    return losses_of_ranks("none")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_as_one_process(one_process, strategy):
    first, second = ranks.call(losses_of_ranks, strategy, True)
    assert first == second
    assert first == pytest.approx(one_process, rel=1e-6)
    assert one_process[2] < one_process[0]


class Training:
    """A run with EMA and a checkpointer."""

    def __init__(self, folder, seed=0):
        self.model = domain_bert(**SIZES, seed=seed)
        self.optimizer, self.ema = adamw(self.model, lr=1e-2), EMA(self.model, 0.5)
        self.checkpointer = Checkpointer(
            folder,
            CheckpointConfig(async_save=False),
            model=self.model,
            optimizer=self.optimizer,
            state={"ema": self.ema},
        )

    def step(self, step):
        loss = loss_of(self.model, batch(step))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        return loss.item()


def test_a_resumed_run_and_one_from_the_folder_continue_bit_for_bit(tmp_path):
    run = Training(tmp_path)
    run.step(1)
    folder = run.checkpointer.save(1)
    saved = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    expected = [run.step(step) for step in (2, 3)]

    resumed = Training(tmp_path, seed=5)
    assert resumed.checkpointer.resume() == 1
    assert [resumed.step(step) for step in (2, 3)] == expected

    model = meta_model_from_hf(folder, pytest.fail)
    model.to_empty(device="cpu")
    coverage = load_hf_weights(model, folder, report=pytest.fail)
    assert len(coverage.loaded) == len(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())

    # The table for transformers is made of the weights beside it, those of the averages too.
    for inner in ("", "ema"):
        bert = load_hf(folder / inner, head=False, report=lambda line: None)
        factors = load_hf(folder / inner, report=pytest.fail).embedding.token_type_embeddings
        table = factored_type_table(
            factors.types.weight, factors.groups.weight, factors.projection.weight, factors.projection.bias
        )
        assert torch.equal(bert.embedding.token_type_embeddings.weight, table)


def test_the_classifier_counts_in_the_flops_of_a_step():
    def flops(loss):
        collator = SimpleNamespace(example_batch=lambda *_: batch(0))
        config = SimpleNamespace(seq_len=16)
        found = flops_per_token(
            config,
            None,
            lambda *_: domain_bert(**SIZES),
            lambda *_: collator,
            lambda model, batch, _: (loss(model, batch), {}),
        )
        return found * batch(0).input_ids.numel()

    def without_classes(model, batch):
        hidden = model(batch.input_ids, token_type_ids=batch.token_type_ids)
        return masked_lm_loss(hidden, model.head, batch.masked_positions, batch.masked_labels)

    width, classes = SIZES["hidden_size"], SIZES["num_suffixes"]
    assert flops(loss_of) - flops(without_classes) == 3 * 2 * ROWS * (width * width + width * classes)


def test_half_precision_is_close_and_the_table_of_types_stays_exact():
    model = domain_bert(**SIZES)
    expected = loss_of(model, batch(1)).item()
    table = model.embedding.token_type_embeddings.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.embedding.token_type_embeddings.weight, table)
        loss = loss_of(model, batch(1))
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=0.02)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_names_longer_than_the_table_of_positions_have_its_last_row():
    model = domain_bert(**SIZES).eval()
    ids = torch.randint(5, 43, (1, 40), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(40).clamp(max=23)[None]
    assert torch.equal(model(ids), model(ids, positions))
