"""A training loop with the public API, for the type checker: `make lint` checks it, nothing runs it."""

from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor, nn

from torchrecipes.checkpoint import CheckpointConfig, Checkpointer, verify
from torchrecipes.data import Corpus, Loader, MLMCollator, PackedDataset, Tokenizer, load_tokenizer, prepare_corpus
from torchrecipes.data.sources import files
from torchrecipes.errors import UserError
from torchrecipes.losses import linear_cross_entropy, masked_lm_loss
from torchrecipes.models import load_hf, neobert, save_hf
from torchrecipes.modules import attention
from torchrecipes.optim import adamw, cosine, describe_param_groups
from torchrecipes.training.ema import EMA
from torchrecipes.training.guard import Guard


def train(folder: Path) -> None:
    tokenizer = assert_type(load_tokenizer(folder), Tokenizer)
    corpus, validation = prepare_corpus(folder, files("text.txt"), tokenizer, validation_fraction=0.1)
    assert_type(validation, Corpus | None)
    assert tokenizer.pad_id is not None
    dataset = PackedDataset(corpus, 128, tokenizer.pad_id)
    loader = Loader(dataset, MLMCollator(tokenizer, 0.2), seed=0, global_batch_size=8, micro_batch_size=4)

    model = neobert("tiny", vocab_size=tokenizer.vocab_size)
    optimizer = adamw(model, lr=1e-3)
    scheduler = cosine(optimizer, max_steps=100)
    guard, ema = Guard(on_nonfinite="skip"), EMA(model, decay=0.999)
    assert_type(describe_param_groups(optimizer), str)
    checkpointer = Checkpointer(
        folder,
        CheckpointConfig(save_every=10),
        model=model,
        optimizer=optimizer,
        state={"loader": loader, "scheduler": scheduler, "guard": guard, "ema": ema},
    )
    step = assert_type(checkpointer.resume(), int)
    while step < 100:
        step += 1
        for batch in loader.next_step():
            hidden = model(batch.input_ids, **batch.documents)
            assert batch.masked_positions is not None and batch.masked_labels is not None and model.head is not None
            loss = masked_lm_loss(hidden, model.head, batch.masked_positions, batch.masked_labels)
            assert isinstance(loss, Tensor)  # a pair with return_token_loss
            loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        guard.step(optimizer, torch.zeros(()), norm)
        scheduler.step()
        ema.update()
        checkpointer.save(step)
    save_hf(model, folder, tokenizer)


def blocks(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    loss = linear_cross_entropy(hidden, weight, labels)
    assert isinstance(loss, Tensor)  # a pair with return_token_loss
    assert_type(attention(hidden, hidden, hidden, causal=True), Tensor)


def models(folder: Path) -> nn.Module:
    try:
        return load_hf(folder)
    except UserError as error:
        print(error.key, error.hint, verify(folder))
        raise
