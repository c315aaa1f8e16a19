"""Pretrain a text encoder by masked language modelling: NeoBERT or BERT, on your own text or on Python's documentation.

    tune-style run mlm_pretrain --config neobert/quickstart
    tune-style run mlm_pretrain --config neobert/small data.source.path='my/*.jsonl'

The quickstart config takes about 4 minutes on 2 CPU cores. Every checkpoint is a Hugging Face model folder that
`AutoModelForMaskedLM.from_pretrained` loads, and a point from which the same command resumes to the last bit.
"""

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Optional

import torch

from torchrecipes.config import MISSING, Component, build, component, parse, to_yaml
from torchrecipes.data.corpus import prepare_corpus
from torchrecipes.data.loader import Loader, evaluation_batches
from torchrecipes.data.masking import Masking
from torchrecipes.data.packing import DocumentRows, PackedRows
from torchrecipes.evaluation.mlm import evaluate_mlm, unigram
from torchrecipes.losses import masked_lm_loss
from torchrecipes.models import load_hf
from torchrecipes.training.budget import budget_steps
from torchrecipes.training.checkpoint import Checkpointer
from torchrecipes.training.guard import check_finite
from torchrecipes.training.memory import checkpoint_activations, out_of_memory_advice
from torchrecipes.training.metrics import Metrics
from torchrecipes.training.precision import autocast, choose_precision
from torchrecipes.training.run import start_run
from torchrecipes.training.signals import Signals


@dataclass
class Data:
    source: Component = component("torchrecipes.data.sources.files", runtime=())  # where the text comes from
    validation_source: Optional[Component] = None  # its own validation text; None: validation_fraction of the source
    validation_fraction: float = 0.005  # share of the documents, chosen by a hash of their text
    corpus_dir: Optional[str] = None  # folder of token shards, shared by runs; None: <output_dir>/corpus
    tokenize_workers: Optional[int] = None  # processes that tokenize; None: one per core
    packing: bool = True  # rows full of documents, attention within each; False: a document per row, padded
    mlm_probability: float = 0.2  # share of the tokens to predict (NeoBERT: 0.2, BERT: 0.15)
    mask_all: bool = False  # True: all of them become [MASK] (NeoBERT); False: 80 % [MASK], 10 % random, 10 % kept
    num_workers: int = 0  # loader processes; 0: in this process, which is fast enough for most models


@dataclass
class Loss:
    masked_logits_only: bool = True  # False: logits of all positions, the same number, slower
    chunk_size: Optional[int] = None  # masked positions whose logits are in memory at a time; None: by vocabulary


@dataclass
class Config:
    output_dir: str = MISSING  # the run's folder
    seed: int = 0

    tokenizer: Component = component(
        "torchrecipes.data.tokenizers.train_wordpiece", runtime=("source", "folder"), vocab_size=16_384
    )
    data: Data = field(default_factory=Data)
    model: Component = component("torchrecipes.models.neobert_tiny", runtime=("vocab_size", "seed"))
    init_from: Optional[str] = None  # a Hugging Face folder to start from instead of `model`
    loss: Loss = field(default_factory=Loss)

    seq_len: int = 256  # tokens per row
    rows_per_step: int = 16  # rows per optimizer step in the whole run
    rows_per_micro_batch: int = 16  # rows per forward pass; changes memory and speed, not the result
    max_steps: Optional[int] = None  # set one of these three
    total_tokens: Optional[int] = None  # e.g. 10B
    epochs: Optional[float] = None

    optimizer: Component = component("torchrecipes.optim.adamw", runtime=("model",), lr=1e-3)
    schedule: Component = component("torchrecipes.optim.cosine", runtime=("max_steps",))
    max_grad_norm: Optional[float] = 1.0
    precision: str = "auto"  # auto | bf16 | fp32
    compile: bool = False  # torch.compile of every block: a minute once, faster after
    activation_checkpointing: bool = False  # computes activations twice, keeps only the blocks' inputs

    log_every: int = 10  # steps
    eval_every: Optional[int] = 500  # steps; also before the first and after the last step
    eval_rows: Optional[int] = 1024  # rows of the validation split that are looked at; None: all
    save_every: Optional[int] = 500  # steps; the last step is always saved
    keep_last: int = 3  # checkpoints
    resume: str = "auto"  # auto | never | path of a checkpoint
    metrics: list[Component] = field(default_factory=list)  # writers beside metrics.jsonl: TensorBoard, WandB


def main(config: Config) -> None:
    run = start_run(config.output_dir, seed=config.seed, config_yaml=to_yaml(config), resume=config.resume)
    precision = choose_precision(config.precision, run.device)
    compute = partial(autocast, run.device, precision)

    source = build(config.data.source)
    validation_source = config.data.validation_source and build(config.data.validation_source)
    corpus_dir = Path(config.data.corpus_dir or run.output_dir / "corpus")
    tokenizer = build(config.tokenizer, source=source, folder=corpus_dir / "tokenizer")
    train_corpus, validation_corpus = prepare_corpus(
        corpus_dir,
        source,
        tokenizer,
        validation_fraction=config.data.validation_fraction,
        validation_source=validation_source,
        num_workers=config.data.tokenize_workers,
    )
    make_rows = PackedRows if config.data.packing else DocumentRows
    rows = make_rows(train_corpus, config.seq_len, tokenizer.pad_id)
    masking = Masking(tokenizer, config.data.mlm_probability, mask_all=config.data.mask_all)
    max_steps = budget_steps(
        max_steps=config.max_steps,
        total_tokens=config.total_tokens,
        epochs=config.epochs,
        rows_per_step=config.rows_per_step,
        num_rows=rows.num_rows,
        tokens_per_row=rows.tokens_per_row,
    )
    epochs = max_steps * config.rows_per_step / rows.num_rows
    run.print(f"training data: {rows}; {max_steps:,} steps of {config.rows_per_step} rows are {epochs:.2f} epochs")

    if config.init_from:
        model = load_hf(config.init_from)
    else:
        model = build(config.model, vocab_size=tokenizer.vocab_size, seed=config.seed)
    model.to(run.device)
    if config.activation_checkpointing:
        checkpoint_activations(model.blocks)
    if config.compile:
        for block in model.blocks:
            block.compile()

    optimizer = build(config.optimizer, model=model)
    schedule = build(config.schedule, max_steps=max_steps)

    checkpointer = Checkpointer(run.output_dir, keep_last=config.keep_last)
    resumed = checkpointer.resume(config.resume)
    if resumed:
        resumed.load_model(model)
        resumed.load_optimizer(model, optimizer)
    first_step = resumed.step + 1 if resumed else 1

    ...


if __name__ == "__main__":
    main(parse(Config))
