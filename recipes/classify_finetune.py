"""Turn an encoder into a classifier of texts or pairs of texts: one label, several labels, or a number.

    tune-style run classify_finetune --config classify_finetune/quickstart  # minutes on two CPU cores
    tune-style run classify_finetune --config classify_finetune/labels data.source.path='my/*.csv' init_from=RUN
    tune-style predict runs/classify_quickstart "Send the request and wait for the response."

The result, `<output_dir>/model`, is a folder for `AutoModelForSequenceClassification`. Run the same command to resume.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor, nn

from torchrecipes.checkpoint import CheckpointConfig, Checkpointer, run_result
from torchrecipes.config import MISSING, Component, Fraction, MayChange, Positive, Rows, Steps, Tokens
from torchrecipes.config import build, component, parse, to_yaml
from torchrecipes.data import Batch, ExampleData, LabeledCollator, Loader, Tokenizer, load_examples
from torchrecipes.distributed import all_reduce_sum, clip_grad_norm, set_grad_sync
from torchrecipes.evaluation import calibrate, classification_metrics, predict_examples, report_classification
from torchrecipes.losses import CLASSIFICATION_LOSSES, check_loss_of_logits
from torchrecipes.models import SequenceClassifier, meta_classifier_from_hf, write_calibration
from torchrecipes.planning import auto_micro_batch_size, flops_per_token, peak_flops, resolve_max_steps
from torchrecipes.training import ComputeConfig, FeatureCache, GracefulStop, LogConfig, MetricLogger, describe_trainable
from torchrecipes.training import few_shot_start, oom_hint, set_trainable, setup_model, start_run, sum_over_ranks
from torchrecipes.training import write_card


@dataclass
class Config:
    output_dir: MayChange[str] = MISSING  # the run's folder
    seed: int = 0  # chooses new weights, the order of the examples and dropout

    data: ExampleData = field(default_factory=lambda: ExampleData(validation_fraction=0.1))  # the examples
    task: Literal["single_label", "multi_label", "regression"] = "single_label"  # what a label is
    label_names: list[str] | None = None  # in the order of the logits; None: those of the training examples, sorted
    label_counts: list[int] | None = None  # examples of each label, for balanced weights; None: counted
    num_examples: int | None = None  # examples, likewise
    tokenizer: Component | None = component(
        None, injected=("source", "folder", "causal"), replaced_by="init_from"
    )  # without init_from: trained on the examples, or loaded
    model: Component | None = component(
        None, injected=("vocab_size", "seed"), replaced_by="init_from", replaced_if="config.json"
    )  # without init_from: an encoder that begins with random weights
    init_from: str | None = None  # a Hugging Face folder, a checkpoint or a run: of an encoder, or of a classifier
    trainable: Literal["classifier", "last_2", "last_3", "all", "lora"] = "all"  # last_2: classifier and last block
    freeze: list[str] = field(default_factory=list)  # patterns of parameters that are not trained, as in blocks.0.*
    few_shot: bool = False  # for 8 to 64 examples of a label: pairs of labels train the encoder first (SetFit)
    lora: Component = component("torchrecipes.modules.apply_lora", injected=("model", "seed"))  # of trainable=lora
    pooling: Literal["cls", "mean", "late"] | None = None  # what the head sees; None: as in init_from, or the family's
    dropout: Fraction | None = None  # in the head; None: as in init_from
    loss: Component | None = component(None, injected=("label_counts", "num_examples"))  # None: the task's own

    seq_len: Tokens = 256  # tokens of a text or a pair, at most
    global_batch_size: Rows = 32  # examples per optimizer step in the whole run
    micro_batch_size: MayChange[Rows | Literal["auto"]] = 32  # examples per forward pass of a process, at most
    max_steps: Steps | None = None  # optimizer steps; set one of these four
    total_tokens: Tokens | None = None  # tokens to train on, as in 10M
    epochs: Positive | None = None  # passes over the examples
    max_minutes: Positive | None = None  # of training: the first steps are timed, and max_steps follows

    optimizer: Component = component("torchrecipes.optim.adamw", injected=("model", "params"), lr=2e-5)
    lr_scheduler: Component = component("torchrecipes.optim.linear", injected=("optimizer", "max_steps"))
    max_grad_norm: Positive | None = 1.0  # gradients are scaled down to this norm; None: never
    guard: MayChange[Component] = component("torchrecipes.training.guard.Guard", injected=("dtype",))  # NaN, spikes
    eval_every: MayChange[Steps | None] = 200  # steps; also before the first and after the last step
    early_stopping: Component | None = component(None)  # torchrecipes.training.EarlyStopping

    compute: ComputeConfig = field(default_factory=ComputeConfig)  # precision, compile, sharding
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)  # when to save, what to keep, resume
    log: LogConfig = field(default_factory=LogConfig)  # how often, and where to


def build_model(config: Config, tokenizer: Tokenizer) -> nn.Module:
    """The encoder and the classification head, on the default device; what is not trained is frozen."""
    check_loss_of_logits(config.loss)
    names = config.label_names or (["number"] if config.task == "regression" else ["0", "1"])  # before the data is read
    settings = {"task": config.task, "max_length": config.seq_len, "pooling": config.pooling, "dropout": config.dropout}
    if config.model is None:
        model = meta_classifier_from_hf(config.init_from, label_names=names, **settings)
    else:
        encoder = build(config.model, vocab_size=tokenizer.vocab_size, seed=config.seed)
        model = SequenceClassifier(encoder, label_names=names, seed=config.seed, **settings)
    build(config.lora if config.trainable == "lora" else None, model=model, seed=config.seed)
    set_trainable(model, config.trainable)
    return model


def build_collator(config: Config, tokenizer: Tokenizer) -> LabeledCollator:
    """Makes batches of examples."""
    return LabeledCollator(tokenizer, token_types=True, task=config.task, num_labels=len(config.label_names or "01"))


def compute_loss(model: nn.Module, batch: Batch, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, summed over the batch's examples, and other sums to log beside it."""
    logits, labels = model.classify(batch), batch.examples.labels
    counts = {"label_counts": config.label_counts or [1] * logits.shape[1], "num_examples": config.num_examples or 2}
    loss = (build(config.loss, **counts) or CLASSIFICATION_LOSSES[config.task]())(logits, labels)
    accuracy = {"accuracy": (logits.argmax(1) == labels).sum()} if config.task == "single_label" else {}
    return loss, {"loss": loss.detach()} | accuracy


def main(config: Config) -> None:
    run = start_run(config)
    guard, early_stopping = build(config.guard, dtype=run.dtype), build(config.early_stopping)
    data, config_yaml = load_examples(config, task=config.task, label_names=config.label_names), to_yaml(config)
    config = data.complete(config)  # label names and counts
    if config.few_shot:
        config = replace(config, init_from=few_shot_start(config, build_model, build_collator, data, run))
    tokenizer, collator = data.tokenizer, build_collator(config, data.tokenizer)
    objective = (config, tokenizer, build_model, build_collator, compute_loss)  # to time and estimate this recipe
    max_steps = resolve_max_steps(*objective, run, data)

    # Float8, activation checkpointing, compile, sharding, initial weights: each needs the ones before it.
    model = setup_model(build_model, config, tokenizer, run)
    print(describe_trainable(model, config.trainable))
    optimizer = build(config.optimizer, model=model, params=[p for p in model.parameters() if p.requires_grad])
    lr_scheduler = build(config.lr_scheduler, optimizer=optimizer, max_steps=max_steps)
    collator = FeatureCache(collator) if config.trainable == "classifier" else collator  # a frozen encoder's outputs
    order = {"seed": config.seed, "shuffle": config.data.shuffle, "num_workers": config.data.num_workers}
    sizes = {"global_batch_size": config.global_batch_size, "micro_batch_size": config.micro_batch_size}
    loader = Loader(data.train, collator, **order, **sizes, **run.placement)
    state = {"loader": loader, "lr_scheduler": lr_scheduler, "guard": guard, "early_stopping": early_stopping}
    state = {name: value for name, value in state.items() if value is not None}
    stored = {"config_yaml": config_yaml, "recipe": __file__, "tokenizer": tokenizer, "state": state}
    checkpointer = Checkpointer(run.output_dir, config.checkpoint, model=model, optimizer=optimizer, **stored)
    step = checkpointer.resume(max_steps)  # 0: from the start
    if loader.micro_batch_size == "auto":  # a resumed run has the size it was started with
        loader.micro_batch_size = auto_micro_batch_size(*objective, run, model)
    metrics = MetricLogger(
        run,
        config.log,
        max_steps=max_steps,
        tokens_per_step=config.global_batch_size * data.train.tokens_per_row,
        flops_per_token=None if config.trainable == "classifier" else flops_per_token(*objective),
        peak_flops=peak_flops(run.device, run.dtype),
        first_step=step + 1,
    )
    if config.trainable == "classifier":
        collator.fill(model, [data.train, *data.eval_sets.values()], run)
    eval_sets = {name: rows for name, rows in data.eval_sets.items() if name != "test"}

    def evaluate(predictions: dict, **calibration) -> dict[str, float]:
        results = {k: classification_metrics(*predictions[k], task=config.task, **calibration) for k in predictions}
        return metrics.log_eval(step, results)

    def judge() -> bool:
        results = metrics.evaluation(step) or evaluate(predict_examples(model, eval_sets, collator, run.autocast))
        checkpointer.record_metrics(step, results)
        return early_stopping is not None and early_stopping.update(step, results)

    def is_due() -> bool:
        return bool(eval_sets and config.eval_every) and (step % config.eval_every == 0 or step == max_steps)

    guard.log_fn = metrics.print
    with checkpointer, metrics, GracefulStop() as stop, oom_hint(loader.micro_batch_size):
        enough = judge() if is_due() else False
        stopped = stop.agreed()
        while step < max_steps and not stopped and not enough:
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
        predictions = predict_examples(model, data.eval_sets, collator, run.autocast)
        calibration = calibrate(*predictions["validation"], task=config.task) if eval_sets else {}
        if "test" in predictions and not metrics.is_evaluated(step, "test"):  # once, by the best checkpoint
            evaluate({"test": predictions["test"]}, **calibration)
        if run.is_main:
            report_classification(run.output_dir, predictions, data.label_names, task=config.task, **calibration)
            with run_result(checkpointer.saved, run.output_dir) as folder:
                write_calibration(folder, **calibration)
                after = metrics.evaluation(step) | metrics.evaluation(best)
                write_card(folder, config, data, metrics.evaluation(0), after)
    print(f"finished {step:,} steps; the result is step {best:,}: {run.output_dir / 'model'}")


if __name__ == "__main__":
    main(parse(Config))
