"""Pretrain a text encoder by masked language modelling: NeoBERT or BERT, on your own text or on Python's documentation.

    tune-style run mlm_pretrain --config neobert/quickstart
    tune-style run mlm_pretrain --config neobert/small data.source.path='my/*.jsonl'
    tune-style run --nproc-per-node 8 mlm_pretrain --config neobert/100m data.source.path='my/*.jsonl'

The quickstart config takes about 4 minutes on 2 CPU cores. Every checkpoint is a Hugging Face model folder that
`AutoModelForMaskedLM.from_pretrained` loads, and a point from which the same command resumes to the last bit.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from torchrecipes.checkpoint.checkpointer import Checkpoint, Checkpointer
from torchrecipes.checkpoint.resume import check_resumable
from torchrecipes.config import MISSING, Component, build, component, parse, to_yaml
from torchrecipes.data.batching.batch import Batch
from torchrecipes.data.batching.loader import Loader, evaluation_batches, rows_per_rank
from torchrecipes.data.batching.mlm import MLMCollator
from torchrecipes.data.batching.packing import PackedDataset, PaddedDataset
from torchrecipes.data.corpus.corpus import prepare_corpus
from torchrecipes.data.tokenizers.load import load_tokenizer
from torchrecipes.distributed import collectives
from torchrecipes.distributed.fsdp import clip_grad_norm, init_on_device, parallelize, set_grad_sync
from torchrecipes.evaluation.mlm import evaluate_mlm, unigram_baseline
from torchrecipes.losses import masked_lm_loss
from torchrecipes.models import check_tokenizer_compatibility, load_hf, loading_hint
from torchrecipes.planning.auto_batch_size import find_micro_batch_size, free_memory
from torchrecipes.planning.check_components import check_components
from torchrecipes.planning.flops import mlm_flops_per_token, peak_flops
from torchrecipes.planning.run_estimate import step_fits
from torchrecipes.training.activation_checkpointing import apply_activation_checkpointing, oom_hint
from torchrecipes.training.duration import describe_duration, resolve_max_steps
from torchrecipes.training.float8 import convert_to_float8
from torchrecipes.training.graceful_stop import GracefulStop
from torchrecipes.training.metrics import MetricLogger
from torchrecipes.training.precision import autocast, resolve_dtype, set_deterministic
from torchrecipes.training.run import start_run


@dataclass
class Data:
    source: Component = component("torchrecipes.data.sources.files")  # where the text comes from
    validation_source: Component | None = None  # its own validation text; None: validation_fraction of the source
    validation_fraction: float = 0.005  # share of the documents, chosen by a hash of their text
    corpus_dir: str | None = None  # folder of token shards, shared by runs; None: <output_dir>/corpus
    tokenizer_threads: int | None = None  # threads that tokenize; None: one per core
    packing: bool = True  # rows full of documents, attention within each; False: a document per row, padded
    mlm_probability: float = 0.2  # share of the tokens to predict (NeoBERT: 0.2, BERT: 0.15)
    mask_all: bool = False  # True: all of them become [MASK] (NeoBERT); False: 80 % [MASK], 10 % random, 10 % kept
    num_workers: int = 0  # loader processes; 0: in this process, which is fast enough for most models


@dataclass
class Parallel:
    strategy: Literal["auto", "none", "ddp", "fsdp", "hsdp"] = "auto"  # what the processes of a run share


@dataclass
class Config:
    output_dir: str = MISSING  # the run's folder
    seed: int = 0  # chooses weights, order of the data, masks and dropout

    tokenizer: Component = component(  # trained on the source, or loaded
        "torchrecipes.data.tokenizers.train_wordpiece", injected=("source", "folder"), vocab_size=16_384
    )
    data: Data = field(default_factory=Data)
    model: Component = component(
        "torchrecipes.models.neobert", injected=("vocab_size", "seed"), size="tiny"
    )  # its network
    init_from: str | None = None  # a Hugging Face folder whose model and tokenizer are taken instead of these two
    masked_logits_only: bool = True  # False: logits of all positions, the same loss, slower

    seq_len: int = 256  # tokens per row
    global_batch_size: int = 16  # rows per optimizer step in the whole run
    micro_batch_size: int | Literal["auto"] = 16  # at most, per forward pass of a process; auto: what fits
    max_steps: int | None = None  # optimizer steps; set one of these three
    total_tokens: int | None = None  # tokens to train on, as in 10B
    epochs: float | None = None  # times that every row is seen

    optimizer: Component = component("torchrecipes.optim.adamw", injected=("model",), lr=1e-3)  # makes the groups, too
    lr_scheduler: Component = component(
        "torchrecipes.optim.cosine", injected=("optimizer", "max_steps")
    )  # warm-up and decay
    max_grad_norm: float | None = 1.0  # gradients are scaled down to this norm; None: never
    precision: Literal["auto", "bf16", "fp32", "float8", "float8_rowwise"] = "auto"  # of matrix products
    emulate_float8: bool = False  # on a device without it: slow, for tests
    deterministic: bool = False  # a GPU's numbers repeat to the last bit, slower; a CPU's do anyway
    compile: bool = False  # torch.compile of every block: a minute once, faster after
    activation_checkpointing: Literal["none", "selective", "full"] = "none"  # less memory, more time
    parallel: Parallel = field(default_factory=Parallel)
    guard: Component = component("torchrecipes.training.guard.Guard")  # skips what is not finite, tells of spikes

    log_every: int = 10  # steps
    eval_every: int | None = 500  # steps; also before the first and after the last step
    eval_sequences: int | None = 1024  # rows of the validation split that are looked at; None: all
    save_every: int | None = 500  # steps; the last step is always saved
    keep_last: int = 3  # checkpoints
    async_save: bool = True  # training goes on while a copy in the CPU's memory is written
    on_save_error: Literal["stop", "continue"] = "stop"  # when a disk is full
    resume: str = "auto"  # auto | never | path of a checkpoint
    loggers: list[Component] = component([], injected=("output_dir",))  # writers beside metrics.jsonl

    def check(self) -> list[str]:
        """What is wrong with keys that are right each by itself."""
        return check_components(self, causal=False)


def main(config: Config) -> None:
    run = start_run(config.output_dir, seed=config.seed, config_yaml=to_yaml(config), resume=config.resume)
    if config.deterministic:
        set_deterministic()
    precision = resolve_dtype(config.precision, run.device, config.emulate_float8)
    compute = partial(autocast, run.device, precision)
    guard = build(config.guard)

    data = config.data
    source, validation_source = build(data.source), build(data.validation_source)
    corpus_dir = Path(data.corpus_dir or run.output_dir / "corpus")
    with collectives.rank0_first("tokenizer and corpus"):
        if config.init_from:
            tokenizer = load_tokenizer(config.init_from, pad_vocab_to_multiple_of=1)
        else:
            tokenizer = build(config.tokenizer, source=source, folder=corpus_dir / "tokenizer")
        masking = MLMCollator(tokenizer, data.mlm_probability, mask_all=data.mask_all)
        train_corpus, validation_corpus = prepare_corpus(
            corpus_dir, source, tokenizer, data.validation_fraction, validation_source, data.tokenizer_threads
        )
    kind = PackedDataset if data.packing else PaddedDataset
    make_rows = partial(kind, seq_len=config.seq_len, pad_id=tokenizer.pad_id)
    rows = make_rows(train_corpus)
    baseline = (
        unigram_baseline(validation_corpus, tokenizer.special_ids, tokenizer.vocab_size) if validation_corpus else None
    )
    max_steps = resolve_max_steps(
        rows,
        config.global_batch_size,
        max_steps=config.max_steps,
        total_tokens=config.total_tokens,
        epochs=config.epochs,
    )
    rank_rows = rows_per_rank(config.global_batch_size, run.world_size)
    print(
        f"training text: {rows}\nto train: {describe_duration(rows, config.global_batch_size, max_steps)}", flush=True
    )

    if config.init_from:
        model = load_hf(config.init_from, seed=config.seed)
    else:
        with torch.device("meta"):  # without memory: each process fills in its own part
            model = build(config.model, vocab_size=tokenizer.vocab_size, seed=config.seed)
    check_tokenizer_compatibility(model, tokenizer, config.seq_len)
    model.train()
    convert_to_float8(model, config.precision, device=run.device, emulate=config.emulate_float8)
    apply_activation_checkpointing(model, config.activation_checkpointing)
    if config.compile:
        for block in model.blocks:
            block.compile()
    parallelize(model, config.parallel.strategy, run.device, precision)
    init_on_device(model, run.device, config.seed)
    optimizer = build(config.optimizer, model=model)
    lr_scheduler = build(config.lr_scheduler, optimizer=optimizer, max_steps=max_steps)

    checkpointer = Checkpointer(run.output_dir, config.keep_last, config.async_save, config.on_save_error)

    def restore(checkpoint: Checkpoint) -> int:
        checkpoint.load_model(model)
        checkpoint.load_optimizer(model, optimizer)
        checkpoint.restore_rng()
        guard.load_state_dict(checkpoint.state["guard"])
        lr_scheduler.load_state_dict(checkpoint.state["lr_scheduler"])
        return checkpoint.step

    resumed = checkpointer.resume(config.resume)
    step, skipped_steps, saved = 0, 0, None  # done; whose data a rollback has left behind; the last checkpoint
    if resumed:
        check_resumable(resumed, train_corpus, config.resume, max_steps)
        step, skipped_steps, saved = restore(resumed), resumed.state["skipped_steps"], resumed.path

    def loss_of(batch: Batch) -> torch.Tensor:
        with compute():
            hidden = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
            positions, labels = batch.masked_positions, batch.masked_labels
            return masked_lm_loss(hidden, model.head, positions, labels, masked_logits_only=config.masked_logits_only)

    def try_step(rows_per_batch: int) -> None:
        for batch in evaluation_batches(rows, masking, rows_per_batch, limit=rows_per_batch, device=run.device):
            loss_of(batch).backward()

    micro_rows = config.micro_batch_size
    if micro_rows == "auto" and resumed:
        micro_rows = resumed.state["micro_batch_size"]
    elif micro_rows == "auto":
        fits = step_fits(config, run, free_memory(run.device, run.local_world_size))
        micro_rows = find_micro_batch_size(
            fits,
            rows_per_rank=rank_rows,
            try_step=try_step,
            clean_up=optimizer.zero_grad,
            agree=collectives.all_reduce_min,
        )

    loader = Loader(
        rows,
        masking,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        micro_batch_size=micro_rows,
        max_steps=max_steps,
        rank=run.rank,
        world_size=run.world_size,
        num_workers=data.num_workers,
        device=run.device,
    )
    loader.seek(step + 1, skipped_steps)
    metrics = MetricLogger(
        run.output_dir,
        max_steps,
        device=run.device,
        tokens_per_step=config.global_batch_size * rows.tokens_per_row,
        flops_per_token=mlm_flops_per_token(model, config.seq_len, data.mlm_probability),
        peak_flops=peak_flops(run.device, precision),
        first_step=step + 1,
        loggers=[build(writer, output_dir=str(run.output_dir)) for writer in config.loggers] if run.is_main else [],
    )

    def save(step: int) -> Path:
        state = {"corpus": train_corpus.fingerprint, "skipped_steps": skipped_steps, "guard": guard.state_dict()}
        state |= {"micro_batch_size": micro_rows, "lr_scheduler": lr_scheduler.state_dict()}
        kept = {"config_yaml": to_yaml(config), "recipe_source": Path(__file__).read_text(encoding="utf-8")}
        return checkpointer.save(step, model, optimizer, tokenizer, state=state, **kept)

    def evaluate(step: int) -> None:
        batches = evaluation_batches(
            make_rows(validation_corpus),
            masking,
            micro_rows,
            config.eval_sequences,
            run.rank,
            run.world_size,
            run.device,
        )
        found = evaluate_mlm(model, batches, tokenizer.unpadded_vocab_size, baseline, compute)
        metrics.log_eval(step, "validation", found)

    guard.log_fn = metrics.print
    with checkpointer, metrics, GracefulStop() as signals, oom_hint(micro_rows):
        if config.eval_every and not resumed:
            with metrics.exclude_time():
                evaluate(step=0)

        while step < max_steps:
            step += 1
            with metrics.begin_step():
                batches = loader.step(step)
            targets = max(1, collectives.all_reduce_sum(sum(batch.num_targets for batch in batches)))
            loss_sum = torch.zeros((), device=run.device)
            for batch in batches:
                set_grad_sync(model, last=batch is batches[-1])
                loss = loss_of(batch)
                (loss * (run.world_size / targets)).backward()  # gradients are averaged over the processes
                loss_sum += loss.detach()
            collectives.all_reduce_sum_(loss_sum)

            grad_norm = clip_grad_norm(model, config.max_grad_norm or float("inf"))
            skipped = guard.step(optimizer, loss_sum / targets, grad_norm)
            lr = lr_scheduler.get_last_lr()[0]
            lr_scheduler.step()
            optimizer.zero_grad()
            metrics.update(loss_sum, targets, skipped)

            # The order matters: log, look, save, evaluate. What the guard has not looked at is not saved, and a failing
            # evaluation loses nothing.
            stopped = collectives.all_reduce_max(
                signals.received or 0
            )  # the signal's number; asked once: it may come any moment
            ends = stopped or step == max_steps
            save_now = ends or (config.save_every and step % config.save_every == 0)
            if save_now or step % config.log_every == 0:
                metrics.log(step, lr=lr, grad_norm=grad_norm, **guard.metrics())
            if guard.check(step, sync=save_now, checkpoint=saved) == "rollback":
                past, step = step, restore(checkpointer.latest_valid())
                skipped_steps += past - step
                loader.seek(step + 1, skipped_steps)
                metrics.truncate_after(step)
                continue
            with metrics.exclude_time():
                if save_now:
                    saved = save(step)
                if ends:
                    checkpointer.wait(final=True)
                if config.eval_every and not stopped and (ends or step % config.eval_every == 0):
                    evaluate(step)
            if stopped and step < max_steps:
                print(f"stopped after step {step}, saved {saved}. The same command goes on from there.")
                raise SystemExit(128 + stopped)

    print(f"finished {max_steps:,} steps: {saved}\n{loading_hint(model, saved)}")


if __name__ == "__main__":
    main(parse(Config))
