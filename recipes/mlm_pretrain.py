"""Pretrain a text encoder by masked language modeling: NeoBERT or BERT, on your own text or on Python's documentation.

    tune-style run mlm_pretrain --config neobert/quickstart  # five minutes on two CPU cores
    tune-style run mlm_pretrain --config neobert/small data.source.path='my/*.jsonl'
    tune-style run --nproc-per-node 8 mlm_pretrain --config neobert/100m data.source.path='my/*.jsonl'

Every checkpoint is a folder for `AutoModelForMaskedLM.from_pretrained`. Run the same command to resume, bit for bit.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from torchrecipes.checkpoint import CheckpointConfig, Checkpointer
from torchrecipes.config import MISSING, Component, Fraction, MayChange, Positive, Rows, Steps, Tokens
from torchrecipes.config import build, component, parse, to_yaml
from torchrecipes.data import Batch, Collator, Loader, TextData, Tokenizer, load_text
from torchrecipes.distributed import all_reduce_sum, clip_grad_norm, set_grad_sync
from torchrecipes.evaluation import evaluate_mlm, mlm_baseline
from torchrecipes.losses import by_source, document_class_loss, masked_lm_loss
from torchrecipes.models import check_causal, loading_hint, meta_model_from_hf
from torchrecipes.planning import auto_micro_batch_size, flops_per_token, peak_flops, resolve_max_steps
from torchrecipes.training import ComputeConfig, GracefulStop, LogConfig, MetricLogger
from torchrecipes.training import oom_hint, setup_model, start_run, sum_over_ranks


@dataclass
class Config:
    output_dir: MayChange[str] = MISSING  # the run's folder
    seed: int = 0  # chooses weights, order of the data, masks and dropout

    data: TextData = field(default_factory=TextData)  # the text, and how it becomes rows
    tokenizer: Component | None = component(  # trained on the text, or loaded
        "torchrecipes.data.tokenizers.train_wordpiece",
        injected=("source", "folder", "causal"),
        replaced_by="init_from",
        vocab_size=16_384,
    )
    model: Component | None = component(  # the network
        "torchrecipes.models.neobert",
        injected=("vocab_size", "seed"),
        replaced_by="init_from",
        replaced_if="config.json",
        size="tiny",
    )
    init_from: str | None = None  # a Hugging Face folder, a checkpoint or a run: its tokenizer, model and weights
    freeze: list[str] = field(default_factory=list)  # patterns of parameters that are not trained, as in blocks.*
    mlm_probability: Fraction = 0.2  # share of the tokens to predict (NeoBERT: 0.2, BERT: 0.15)
    mask_all: bool = False  # True: all of them become [MASK] (NeoBERT); False: 80 % [MASK], 10 % random, 10 % kept
    collator: Component = component(  # what is masked, and how
        "torchrecipes.data.MLMCollator", injected=("tokenizer", "mlm_probability", "mask_all")
    )
    masked_logits_only: bool = True  # False: logits of all positions, the same loss, slower

    seq_len: Tokens = 256  # tokens per row
    global_batch_size: Rows = 16  # rows per optimizer step in the whole run
    micro_batch_size: MayChange[Rows | Literal["auto"]] = 16  # rows per forward pass of a process, at most
    max_steps: Steps | None = None  # optimizer steps; set one of these four
    total_tokens: Tokens | None = None  # tokens to train on, as in 10B
    epochs: Positive | None = None  # passes over the text
    max_minutes: Positive | None = None  # of training: the first steps are timed, and max_steps follows

    optimizer: Component = component("torchrecipes.optim.adamw", injected=("model", "params"), lr=1e-3)
    lr_scheduler: Component = component("torchrecipes.optim.cosine", injected=("optimizer", "max_steps"))
    max_grad_norm: Positive | None = 1.0  # gradients are scaled down to this norm; None: never
    guard: MayChange[Component] = component("torchrecipes.training.guard.Guard", injected=("dtype",))  # NaN, spikes
    ema: Component | None = component(None, injected=("model",))  # torchrecipes.training.ema.EMA: averaged weights
    eval_every: MayChange[Steps | None] = 500  # steps; also before the first and after the last step
    eval_sequences: MayChange[Rows | None] = 1024  # rows of the validation text that are used; None: all

    compute: ComputeConfig = field(default_factory=ComputeConfig)  # precision, compile, sharding
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)  # when to save, what to keep, resume
    log: LogConfig = field(default_factory=LogConfig)  # how often, and where to


def build_model(config: Config, tokenizer: Tokenizer) -> nn.Module:
    """The network, on the default device."""
    if config.model is None:
        model = meta_model_from_hf(config.init_from)
    else:
        model = build(config.model, vocab_size=tokenizer.vocab_size, seed=config.seed)
    check_causal(model, False)
    return model


def build_collator(config: Config, tokenizer: Tokenizer) -> Collator:
    """Makes batches of rows. The probability may also be a function of the optimizer step."""
    masking = {"mlm_probability": config.mlm_probability, "mask_all": config.mask_all}
    return build(config.collator, tokenizer=tokenizer, **masking)


def compute_loss(model: nn.Module, batch: Batch, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, summed over the batch's targets, and other sums to log beside it."""
    hidden = model(batch.input_ids, **batch.documents)
    options = {"masked_logits_only": config.masked_logits_only, "return_token_loss": True}
    loss, token_loss = masked_lm_loss(hidden, model.head, batch.masked_positions, batch.masked_labels, **options)
    class_loss, sums = document_class_loss(hidden, model, batch)
    return loss + class_loss, {"loss": loss.detach()} | sums | by_source(token_loss, batch)


def main(config: Config) -> None:
    run = start_run(config)
    guard = build(config.guard, dtype=run.dtype)
    text = load_text(config, causal=False)
    tokenizer, collator = text.tokenizer, build_collator(config, text.tokenizer)
    objective = (config, tokenizer, build_model, build_collator, compute_loss)  # to time and estimate this recipe
    max_steps = resolve_max_steps(*objective, run, text)

    # Float8, activation checkpointing, compile, sharding, initial weights: each needs the ones before it.
    model = setup_model(build_model, config, tokenizer, run)
    optimizer = build(config.optimizer, model=model, params=[p for p in model.parameters() if p.requires_grad])
    lr_scheduler = build(config.lr_scheduler, optimizer=optimizer, max_steps=max_steps)
    ema = build(config.ema, model=model)

    order = {"seed": config.seed, "shuffle": config.data.shuffle, "num_workers": config.data.num_workers}
    sizes = {"global_batch_size": config.global_batch_size, "micro_batch_size": config.micro_batch_size}
    loader = Loader(text.train, collator, **order, **sizes, **run.placement)
    checkpointer = Checkpointer(
        run.output_dir,
        config.checkpoint,
        model=model,
        optimizer=optimizer,
        tokenizer=tokenizer,
        state={"loader": loader, "lr_scheduler": lr_scheduler, "guard": guard} | ({"ema": ema} if ema else {}),
        config_yaml=to_yaml(config),
        recipe=__file__,
    )
    step = checkpointer.resume(max_steps)  # 0: from the start
    if loader.micro_batch_size == "auto":  # a resumed run has the size it was started with
        loader.micro_batch_size = auto_micro_batch_size(*objective, run, model)
    metrics = MetricLogger(
        run,
        config.log,
        max_steps=max_steps,
        tokens_per_step=config.global_batch_size * text.train.tokens_per_row,
        flops_per_token=flops_per_token(*objective),
        peak_flops=peak_flops(run.device, run.dtype),
        first_step=step + 1,
    )
    baselines = {k: mlm_baseline(rows.corpus, tokenizer, text.train_corpora(k)) for k, rows in text.eval_sets.items()}
    masking = {"mlm_probability": config.mlm_probability, "mask_all": config.mask_all}  # at a constant rate
    eval_collator = build(config.collator, tokenizer=tokenizer, **masking)

    def evaluate(suffix: str = "") -> dict[str, float]:
        sets = text.eval_batches(eval_collator, loader.micro_batch_size, config.eval_sequences, **run.placement)
        options = {"unpadded_vocab_size": tokenizer.unpadded_vocab_size, "autocast": run.autocast}
        results = {name: evaluate_mlm(model, sets[name], baseline=baselines[name], **options) for name in sets}
        return metrics.log_eval(step, results, suffix)

    def evaluate_all() -> None:
        results = evaluate()
        if ema:
            with ema.averaged():
                results |= evaluate("_ema")
        checkpointer.record_metrics(step, results)

    guard.log_fn = metrics.print
    with checkpointer, metrics, GracefulStop() as stop, oom_hint(loader.micro_batch_size):
        suffix = "_ema" if ema else ""  # evaluated last: missing at the start, and after an interruption
        is_due = config.eval_every and (step % config.eval_every == 0 or step == max_steps)
        if is_due and not metrics.is_evaluated(step, suffix):
            with metrics.exclude_time():
                evaluate_all()
        stopped = stop.agreed()
        while step < max_steps and not stopped:
            step += 1
            with metrics.begin_step():
                batches = loader.next_step()
            num_targets = max(1, all_reduce_sum(sum(batch.num_targets for batch in batches)))
            logged = []
            for batch in metrics.track(batches):
                set_grad_sync(model, last=batch is batches[-1])
                with run.autocast():
                    loss, sums = compute_loss(model, batch, config)
                (loss * (guard.loss_scale * run.world_size / num_targets)).backward()  # averaged over the processes
                logged.append(sums)
            sums = sum_over_ranks(logged)
            grad_norm = clip_grad_norm(model, config.max_grad_norm or float("inf"), guard.loss_scale)
            lr = lr_scheduler.get_last_lr()[0]
            skipped = guard.step(optimizer, sums["loss"] / num_targets, grad_norm)  # optimizer.step() if finite
            optimizer.zero_grad()
            lr_scheduler.step()
            if ema:
                ema.update()
            metrics.update(sums, num_targets, skipped)
            # In this order: only a checked step is saved, and an evaluation that fails loses nothing.
            stopped = stop.agreed()  # the signal's number, the same on all ranks
            is_last = stopped or step == max_steps
            eval_now = config.eval_every and not stopped and (is_last or step % config.eval_every == 0)
            save_now = checkpointer.is_due(step, is_last, eval_now)
            if save_now or step % config.log.log_every == 0:
                metrics.log(step, lr=lr, grad_norm=grad_norm, **guard.metrics())
            if guard.check(step, sync=save_now, checkpoint=checkpointer.saved) == "rollback":
                step = checkpointer.rollback()  # restores weights and state; continues with later data
                metrics.truncate_after(step)
                continue
            with metrics.exclude_time():
                if save_now:
                    checkpointer.save(step)
                if is_last:
                    checkpointer.wait(final=True)
                if eval_now:
                    evaluate_all()

    if stopped and step < max_steps:
        print(f"stopped after step {step}, saved {checkpointer.saved}. Run the same command to resume.")
        raise SystemExit(128 + stopped)  # as shells do
    print(f"finished {max_steps:,} steps: {checkpointer.saved}\n{loading_hint(model, checkpointer.saved)}")


if __name__ == "__main__":
    main(parse(Config))
