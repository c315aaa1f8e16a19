"""Specialize a trained model on a domain without making it forget: domain text, replay of general text, both watched.

    tune-style run domain_adapt --config domain_adapt/quickstart  # five minutes on two CPU cores
    tune-style run domain_adapt --config domain_adapt/three_stage init_from=models/base

Decoders and encoders alike, from a run, a checkpoint or a Hugging Face folder. Every evaluation set is measured before
the first step: the baseline. Exit code 4: the general loss rose above `forgetting.stop`. The same command resumes.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from torchrecipes.checkpoint import CheckpointConfig, Checkpointer, KeepBest
from torchrecipes.config import MISSING, Component, Fraction, MayChange, NonNegative, Positive, Rows, Steps, Tokens
from torchrecipes.config import build, component, parse, to_yaml
from torchrecipes.data import Batch, CausalLMCollator, Loader, MLMCollator, TextData, Tokenizer, load_text
from torchrecipes.distributed import all_reduce_sum, clip_grad_norm, set_grad_sync
from torchrecipes.evaluation import evaluate_causal, evaluate_mlm, position_edges, unigram_baseline
from torchrecipes.losses import by_source, causal_lm_loss, masked_lm_loss
from torchrecipes.models import check_causal, is_decoder, loading_hint, meta_model_from_hf, set_dropout
from torchrecipes.planning import auto_micro_batch_size, flops_per_token, peak_flops, resolve_max_steps
from torchrecipes.training import ComputeConfig, ExpertBalance, ForgettingConfig, ForgettingController, GracefulStop
from torchrecipes.training import (
    LogConfig,
    MetricLogger,
    oom_hint,
    router_loss,
    setup_model,
    start_run,
    stored_baseline,
)
from torchrecipes.training import sum_over_ranks


# The lowest domain loss among checkpoints whose general loss rose by 3 % at most.
BEST = KeepBest("eval/domain/loss", at_most={"eval/general/change_percent": 3.0})


@dataclass
class Config:
    output_dir: MayChange[str] = MISSING  # the run's folder
    seed: int = 0  # chooses the order of the data, masks and dropout

    data: TextData = field(default_factory=TextData)  # a mixture of domain and general text, and the evaluation sets
    init_from: str = MISSING  # a Hugging Face folder, a checkpoint or a run: its tokenizer, model and weights
    tokenizer: Component | None = component(None, injected=("source", "folder", "causal"))  # None: that of init_from
    model: Component | None = component(None, injected=("vocab_size", "seed"))  # None: as config.json there describes
    objective: Literal["auto", "causal", "masked"] = "auto"  # what is predicted; auto: as config.json says
    longer_context: Component | None = component(
        None, injected=("model", "seq_len")
    )  # torchrecipes.models.extend_context
    freeze: list[str] = field(default_factory=list)  # patterns of parameters that are not trained, as in blocks.0.*
    dropout: Fraction | None = None  # of embeddings and layers; None: as in the checkpoint
    mlm_probability: Fraction = 0.15  # masked: share of the tokens to predict
    mask_all: bool = False  # masked: True: all of them become [MASK]; False: 80 % [MASK], 10 % random, 10 % kept
    z_loss: NonNegative = 0.0  # causal: weight of the squared logarithm of the softmax's denominator (PaLM: 1e-4)
    router_bias_update_rate: NonNegative = 0.001  # of a mixture of experts that has router biases

    seq_len: Tokens = 256  # tokens per row
    global_batch_size: Rows = 16  # rows per optimizer step in the whole run
    micro_batch_size: MayChange[Rows | Literal["auto"]] = 16  # rows per forward pass of a process, at most
    max_steps: Steps | None = None  # optimizer steps; set one of these four
    total_tokens: Tokens | None = None  # tokens to train on, as in 100M
    epochs: Positive | None = None  # passes over the text
    max_minutes: Positive | None = None  # of training: the first steps are timed, and max_steps follows

    optimizer: Component = component("torchrecipes.optim.adamw", injected=("model", "params"), lr=5e-5)
    # A model whose learning rate has decayed needs a warm-up and a decay again (Ibrahim et al. 2024, 2403.08763).
    lr_scheduler: Component = component("torchrecipes.optim.cosine", injected=("optimizer", "max_steps"))
    max_grad_norm: Positive | None = 1.0  # gradients are scaled down to this norm; None: never
    guard: MayChange[Component] = component("torchrecipes.training.guard.Guard", injected=("dtype",))  # NaN, spikes
    forgetting: MayChange[ForgettingConfig | None] = field(default_factory=ForgettingConfig)  # bands; None: only logged
    eval_every: MayChange[Steps | None] = 200  # steps; also before the first and after the last step
    eval_sequences: Rows | None = 512  # rows of each evaluation set that are used; None: all

    compute: ComputeConfig = field(default_factory=ComputeConfig)  # precision, compile, sharding
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(keep_best=BEST))
    log: LogConfig = field(default_factory=LogConfig)  # how often, and where to


def is_causal(config: Config) -> bool:
    """Whether the next token is predicted, or masked ones."""
    return is_decoder(config.init_from) if config.objective == "auto" else config.objective == "causal"


def build_model(config: Config, tokenizer: Tokenizer) -> nn.Module:
    """The network, on the default device."""
    if config.model is None:
        model = meta_model_from_hf(config.init_from)
    else:
        model = build(config.model, vocab_size=tokenizer.vocab_size, seed=config.seed)
    check_causal(model, is_causal(config))
    build(config.longer_context, model=model, seq_len=config.seq_len)
    if config.dropout is not None:
        set_dropout(model, config.dropout)
    return model


def build_collator(config: Config, tokenizer: Tokenizer) -> CausalLMCollator | MLMCollator:
    """Makes batches of rows."""
    if is_causal(config):
        return CausalLMCollator(tokenizer.eos_id)
    return MLMCollator(tokenizer, config.mlm_probability, mask_all=config.mask_all)


def compute_loss(model: nn.Module, batch: Batch, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, summed over the batch's targets, and other sums to log beside it: the loss of every source."""
    output = (model(batch.input_ids, **batch.documents), model.head)
    if batch.labels is not None:
        loss, token_loss = causal_lm_loss(*output, batch.labels, z_loss=config.z_loss, return_token_loss=True)
    else:
        targets = (batch.masked_positions, batch.masked_labels)
        loss, token_loss = masked_lm_loss(*output, *targets, return_token_loss=True)
    return loss + router_loss(model), {"loss": token_loss.sum()} | by_source(token_loss, batch)


def main(config: Config) -> None:
    run = start_run(config)
    guard, causal = build(config.guard, dtype=run.dtype), is_causal(config)
    text = load_text(config, causal=causal)
    tokenizer, collator = text.tokenizer, build_collator(config, text.tokenizer)
    objective = (config, tokenizer, build_model, build_collator, compute_loss)  # to time and estimate this recipe
    max_steps = resolve_max_steps(*objective, run, text)

    # Float8, activation checkpointing, compile, sharding, initial weights: each needs the ones before it.
    model = setup_model(build_model, config, tokenizer, run)
    optimizer = build(config.optimizer, model=model, params=[p for p in model.parameters() if p.requires_grad])
    lr_scheduler = build(config.lr_scheduler, optimizer=optimizer, max_steps=max_steps)
    balance = ExpertBalance(model, config.router_bias_update_rate)  # a dense model has nothing to balance
    order = {"seed": config.seed, "shuffle": config.data.shuffle, "num_workers": config.data.num_workers}
    sizes = {"global_batch_size": config.global_batch_size, "micro_batch_size": config.micro_batch_size}
    loader = Loader(text.train, collator, **order, **sizes, **run.placement)
    measured_on = {name: f"{config.eval_sequences} of {rows.identity()}" for name, rows in text.eval_sets.items()}
    forgetting = ForgettingController(config.forgetting, stored_baseline(config.init_from), measured_on)
    forgetting.check_mixture(loader.source_weights)
    checkpointer = Checkpointer(
        run.output_dir,
        config.checkpoint,
        model=model,
        optimizer=optimizer,
        tokenizer=tokenizer,
        state={"loader": loader, "lr_scheduler": lr_scheduler, "guard": guard, "forgetting": forgetting},
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
    evaluate, left_out = (evaluate_causal, ()) if causal else (evaluate_mlm, tokenizer.special_ids)
    unigrams = {k: unigram_baseline(rows.corpus, left_out, tokenizer.vocab_size) for k, rows in text.eval_sets.items()}
    edges = position_edges(config.seq_len) if config.longer_context else ()  # the loss by position, before and after

    def is_due() -> bool:
        return bool(config.eval_every) and (step % config.eval_every == 0 or step == max_steps)

    def evaluate_all() -> dict[str, float]:
        sets = text.eval_batches(collator, loader.micro_batch_size, config.eval_sequences, **run.placement)
        options = {"autocast": run.autocast, "position_edges": edges}
        results = {k: evaluate(model, sets[k], tokenizer.unpadded_vocab_size, unigrams[k], **options) for k in sets}
        return metrics.log_eval(step, forgetting.compare(step, results))

    def judge() -> str:
        results = metrics.evaluation(step) or evaluate_all()  # once: a run that resumes here judges what was logged
        checkpointer.record_metrics(step, results)
        if (decision := forgetting.judge(step, results)) == "raise_replay":
            loader.set_source_weights(forgetting.raised(loader.source_weights))
        return decision

    guard.log_fn = forgetting.log_fn = metrics.print
    with checkpointer, metrics, GracefulStop() as stop, oom_hint(loader.micro_batch_size):
        decision = judge() if is_due() else "continue"
        stopped = stop.agreed()
        while step < max_steps and not stopped and decision != "stop":
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
                balance.add(model)
            sums = sum_over_ranks(logged)
            grad_norm = clip_grad_norm(model, config.max_grad_norm or float("inf"), guard.loss_scale)
            lr = lr_scheduler.get_last_lr()[0]
            skipped = guard.step(optimizer, sums["loss"] / num_targets, grad_norm)  # optimizer.step() if finite
            optimizer.zero_grad()
            balance.step(skipped)
            lr_scheduler.step()
            metrics.update(sums, num_targets, skipped)
            # In this order: only a checked step is saved, and an evaluation that fails loses nothing.
            stopped = stop.agreed()  # the signal's number, the same on all ranks
            is_last = stopped or step == max_steps
            eval_now = is_due() and not stopped
            save_now = checkpointer.is_due(step, is_last, eval_now)
            if save_now or step % config.log.log_every == 0:
                replay = forgetting.metrics(loader.source_weights)
                metrics.log(step, lr=lr, grad_norm=grad_norm, **replay, **guard.metrics(), **balance.metrics())
            if guard.check(step, sync=save_now, checkpoint=checkpointer.saved) == "rollback":
                step = checkpointer.rollback()  # restores weights and state; continues with later data
                metrics.truncate_after(step)
                decision = judge() if is_due() else "continue"  # the checkpoint is from before its evaluation
                continue
            with metrics.exclude_time():
                if save_now:
                    checkpointer.save(step)
                if is_last:
                    checkpointer.wait(final=True)
                if eval_now:
                    decision = judge()
        if decision == "stop":
            checkpointer.save(step)
            checkpointer.wait(final=True)

    print(f"the best checkpoint: {checkpointer.best or 'none within the limits of checkpoint.keep_best'}")
    if decision == "stop":
        print(f"stopped at step {step} by forgetting.stop, saved {checkpointer.saved}")
        raise SystemExit(4)
    if stopped and step < max_steps:
        print(f"stopped after step {step}, saved {checkpointer.saved}. Run the same command to resume.")
        raise SystemExit(128 + stopped)  # as shells do
    print(f"finished {max_steps:,} steps: {checkpointer.saved}\n{loading_hint(model, checkpointer.saved)}")


if __name__ == "__main__":
    main(parse(Config))
