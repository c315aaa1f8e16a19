"""Turn an encoder into a text embedding model, by contrastive learning on pairs, triplets, scores, labels or raw text.

    tune-style run contrastive_finetune --config contrastive_finetune/quickstart  # minutes on two CPU cores
    tune-style run contrastive_finetune --config contrastive_finetune/pairs data.source.path='my/*.jsonl' init_from=RUN
    tune-style embed runs/contrastive_quickstart "sort a list in place"

The result, `<output_dir>/model`, is a folder for `SentenceTransformer`. Run the same command to resume, bit for bit.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from torchrecipes.checkpoint import CheckpointConfig, Checkpointer, run_result
from torchrecipes.config import MISSING, Component, MayChange, Positive, Rows, Steps, Tokens
from torchrecipes.config import build, component, parse, to_yaml
from torchrecipes.data import Batch, Collator, ExampleData, Examples, Loader, Tokenizer, load_examples
from torchrecipes.distributed import all_reduce_sum, clip_grad_norm, set_grad_sync
from torchrecipes.evaluation import TextEncoder
from torchrecipes.losses import by_dataset
from torchrecipes.models import EmbeddingConfig, EmbeddingModel, meta_embedding_model
from torchrecipes.planning import auto_micro_batch_size, flops_per_token, peak_flops, resolve_max_steps
from torchrecipes.training import ComputeConfig, GracefulStop, LogConfig, MetricLogger, embed_all, load_guide
from torchrecipes.training import oom_hint, random_state, replay, setup_model, start_run, sum_over_ranks, write_card


@dataclass
class Config:
    output_dir: MayChange[str] = MISSING  # the run's folder
    seed: int = 0  # chooses new weights, the order of the examples and dropout

    data: ExampleData = field(default_factory=ExampleData)  # the examples
    tokenizer: Component | None = component(  # trained on the examples, or loaded
        "torchrecipes.data.tokenizers.train_wordpiece",
        injected=("source", "folder", "causal"),
        replaced_by="init_from",
        vocab_size=16_384,
    )
    model: Component | None = component(  # an encoder that begins with random weights
        "torchrecipes.models.neobert",
        injected=("vocab_size", "seed"),
        replaced_by="init_from",
        replaced_if="config.json",
        size="tiny",
    )
    init_from: str | None = None  # a Hugging Face or SentenceTransformer folder, a checkpoint or a run
    freeze: list[str] = field(default_factory=list)  # patterns of parameters that are not trained, as in blocks.0.*
    lora: Component | None = component(None, injected=("model", "seed"))  # torchrecipes.modules.apply_lora
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)  # pooling, projection, normalization, prompts
    loss: Component = component("torchrecipes.losses.InfoNCE", temperature=0.05)  # of the embeddings of a step
    guide: str | None = None  # an embedding model of the same tokenizer that finds false negatives: GISTEmbed
    collator: Component = component(  # of texts as they are; of SimCSE with repeat_texts: true
        "torchrecipes.data.PairCollator", injected=("tokenizer", "include_prompt", "late_interaction")
    )

    seq_len: Tokens = 256  # tokens of a text, at most
    global_batch_size: Rows = 64  # examples per optimizer step in the whole run: what negatives are taken from
    micro_batch_size: MayChange[Rows | Literal["auto"]] = 64  # examples per forward pass of a process, at most
    max_steps: Steps | None = None  # optimizer steps; set one of these four
    total_tokens: Tokens | None = None  # tokens to train on, as in 10M
    epochs: Positive | None = None  # passes over the examples
    max_minutes: Positive | None = None  # of training: the first steps are timed, and max_steps follows

    optimizer: Component = component("torchrecipes.optim.adamw", injected=("model", "params"), lr=2e-5)
    lr_scheduler: Component = component("torchrecipes.optim.linear", injected=("optimizer", "max_steps"))
    max_grad_norm: Positive | None = 1.0  # gradients are scaled down to this norm; None: never
    guard: MayChange[Component] = component("torchrecipes.training.guard.Guard", injected=("dtype",))  # NaN, spikes
    evaluators: dict[str, Component] = field(default_factory=dict)  # by name: torchrecipes.evaluation.STS, Retrieval
    final_evaluators: dict[str, Component] = field(default_factory=dict)  # of the result, once, at the end
    eval_dims: list[int] = field(default_factory=list)  # Matryoshka: evaluate these first dimensions, too
    eval_every: MayChange[Steps | None] = 500  # steps; also before the first and after the last step
    early_stopping: Component | None = component(None)  # torchrecipes.training.EarlyStopping

    compute: ComputeConfig = field(default_factory=ComputeConfig)  # precision, compile, sharding
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)  # when to save, what to keep, resume
    log: LogConfig = field(default_factory=LogConfig)  # how often, and where to


def build_model(config: Config, tokenizer: Tokenizer) -> nn.Module:
    """The encoder, pooling, projection and normalization, on the default device."""
    config.embedding.check_loss(config.loss)
    settings = config.embedding.chosen | {"max_length": config.seq_len}
    if config.model is None:
        model = meta_embedding_model(config.init_from, **settings)
    else:
        model = EmbeddingModel(build(config.model, vocab_size=tokenizer.vocab_size, seed=config.seed), **settings)
    build(config.lora, model=model, seed=config.seed)
    return model


def build_collator(config: Config, tokenizer: Tokenizer) -> Collator:
    """Makes batches of examples."""
    _, include_prompt = config.embedding.prompting(config.init_from)
    late = config.embedding.tokens_as_vectors(config.init_from)
    return build(config.collator, tokenizer=tokenizer, include_prompt=include_prompt, late_interaction=late)


def embedding_loss(embeddings: Tensor, examples: Examples, config: Config, guide: Tensor | None = None):
    """The loss of embeddings, summed over the examples, and other sums to log beside it."""
    return build(config.loss)(embeddings, examples, guide)


def compute_loss(model: nn.Module, batch: Batch, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """`embedding_loss` of one batch, to time and estimate a step; the model's own embeddings stand for the guide's."""
    embeddings = model.embed(batch)
    return embedding_loss(embeddings, batch.examples, config, embeddings.detach() if config.guide else None)


def main(config: Config) -> None:
    run = start_run(config)
    guard, early_stopping = build(config.guard, dtype=run.dtype), build(config.early_stopping)
    data = load_examples(config, prompts=config.embedding.prompting(config.init_from)[0])
    tokenizer, collator = data.tokenizer, build_collator(config, data.tokenizer)
    evaluators = {name: build(evaluator) for name, evaluator in config.evaluators.items()}
    objective = (config, tokenizer, build_model, build_collator, compute_loss)  # to time and estimate this recipe
    max_steps = resolve_max_steps(*objective, run, data)

    # Float8, activation checkpointing, compile, sharding, initial weights: each needs the ones before it.
    model = setup_model(build_model, config, tokenizer, run)
    guide = load_guide(config.guide, tokenizer, run.device) if config.guide else None
    optimizer = build(config.optimizer, model=model, params=[p for p in model.parameters() if p.requires_grad])
    lr_scheduler = build(config.lr_scheduler, optimizer=optimizer, max_steps=max_steps)
    order = {"seed": config.seed, "shuffle": config.data.shuffle, "num_workers": config.data.num_workers}
    sizes = {"global_batch_size": config.global_batch_size, "micro_batch_size": config.micro_batch_size}
    loader = Loader(data.train, collator, **order, **sizes, **run.placement)
    state = {"loader": loader, "lr_scheduler": lr_scheduler, "guard": guard, "early_stopping": early_stopping}
    state = {name: value for name, value in state.items() if value is not None}
    stored = {"config_yaml": to_yaml(config), "recipe": __file__, "tokenizer": tokenizer, "state": state}
    checkpointer = Checkpointer(run.output_dir, config.checkpoint, model=model, optimizer=optimizer, **stored)
    step = checkpointer.resume(max_steps)  # 0: from the start
    if loader.micro_batch_size == "auto":  # a resumed run has the size it was started with
        loader.micro_batch_size = auto_micro_batch_size(*objective, run, model)
    lengths = {"tokens_per_step": config.global_batch_size * data.train.tokens_per_row, "max_steps": max_steps}
    flops = {"flops_per_token": flops_per_token(*objective), "peak_flops": peak_flops(run.device, run.dtype)}
    metrics = MetricLogger(run, config.log, first_step=step + 1, **lengths, **flops)
    encoder = TextEncoder(model, tokenizer, max_length=config.seq_len, autocast=run.autocast)

    def evaluate(evaluators: dict) -> dict[str, float]:
        return metrics.log_eval(step, {k: evaluators[k](encoder, config.eval_dims) for k in evaluators})

    def judge() -> bool:
        results = metrics.evaluation(step) or evaluate(evaluators)  # once: a resumed run reads what was logged
        checkpointer.record_metrics(step, results)
        return early_stopping is not None and early_stopping.update(step, results)

    def is_due() -> bool:
        return bool(evaluators and config.eval_every) and (step % config.eval_every == 0 or step == max_steps)

    guard.log_fn = metrics.print
    with checkpointer, metrics, GracefulStop() as stop, oom_hint(loader.micro_batch_size):
        enough = judge() if is_due() else False
        stopped = stop.agreed()
        while step < max_steps and not stopped and not enough:
            step += 1
            with metrics.begin_step():
                batches = loader.next_step()
            num_targets = max(1, all_reduce_sum(sum(batch.num_targets for batch in batches)))
            # The loss compares all texts of the step. With several micro-batches they are embedded without a graph
            # first; the loss gives the gradients of the embeddings, and every micro-batch is embedded again, with the
            # same dropout, for the gradients of the weights: GradCache (Gao et al. 2021, arXiv:2101.06983).
            is_cached, states, parts = len(batches) > 1, [], []
            set_grad_sync(model, last=True)
            for batch in batches:
                states.append(random_state(run.device))
                with torch.set_grad_enabled(not is_cached), run.autocast():
                    parts.append(model.embed(batch))
            embeddings = torch.cat(parts).detach().requires_grad_() if is_cached else parts[0]
            examples = Examples.join([batch.examples for batch in batches])
            loss, sums = embedding_loss(embeddings, examples, config, guide and embed_all(guide, batches, run.autocast))
            (loss * (guard.loss_scale * run.world_size / num_targets)).backward()  # averaged over the processes
            if is_cached:
                gradients = embeddings.grad.split([len(part) for part in parts])
                for batch, state, gradient in zip(metrics.track(batches), states, gradients, strict=True):
                    set_grad_sync(model, last=batch is batches[-1])
                    with replay(state), run.autocast():
                        model.embed(batch).backward(gradient)
            sums = sum_over_ranks([sums | by_dataset(loss, batches)])
            grad_norm = clip_grad_norm(model, config.max_grad_norm or float("inf"), guard.loss_scale)
            lr = lr_scheduler.get_last_lr()[0]
            skipped = guard.step(optimizer, sums["loss"] / num_targets, grad_norm)  # optimizer.step() if finite
            optimizer.zero_grad()
            lr_scheduler.step()
            metrics.update(sums, num_targets, skipped)
            # In this order: only a checked step is saved, and an evaluation that fails loses nothing.
            stopped = stop.agreed()  # the signal's number, the same on all ranks
            is_last = stopped or step == max_steps
            eval_now = is_due() and not stopped
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
                    enough = judge()

        if enough:
            checkpointer.save(step)
        if stopped and step < max_steps:
            print(f"stopped after step {step}, saved {checkpointer.saved}. Run the same command to resume.")
            raise SystemExit(128 + stopped)  # as shells do
        best = checkpointer.restore_best() or step
        evaluate({name: build(evaluator) for name, evaluator in config.final_evaluators.items()})
        if run.is_main:
            with run_result(checkpointer.saved, run.output_dir) as folder:
                after = metrics.evaluation(step) | metrics.evaluation(best)
                write_card(folder, config, data, metrics.evaluation(0), after)
    print(f"finished {step:,} steps; the result is step {best:,}: {run.output_dir / 'model'}")


if __name__ == "__main__":
    main(parse(Config))
