"""The parts of a training run.

run                        `start_run`: processes, folder, device, seed; the config group `compute`
setup                      `setup_model`: float8, activation checkpointing, compile, sharding, weights
precision                  number formats of the forward and backward pass
float8                     8-bit matrix products through torchao
activation_checkpointing   less memory for more time; the hint when memory runs out
expert_load_balancing      the load of a mixture's experts
trainable                  `set_trainable`, `describe_trainable`: which part of a classifier is trained
ema                        `EMA`: averaged weights
frozen_features            `FeatureCache`: a frozen encoder's outputs, computed once
few_shot                   `few_shot_start`: pairs of labels train the encoder, then the classifier is fitted (SetFit)
forgetting                 `ForgettingController`: evaluations against a baseline; more replay, or the end of the run
grad_cache                 `random_state`, `replay`: a contrastive step in the memory of one micro-batch
guide                      `load_guide`: a model that finds false negatives
early_stopping             `EarlyStopping`: ends a run whose metric no longer improves
guard                      `Guard`: skips non-finite steps, reports spikes, rolls back
graceful_stop              Ctrl+C and SIGTERM end a run after its step
metrics                    `MetricLogger`: metrics.jsonl, the terminal, loggers; the config group `log`
result_card                `write_card`: the model card of a result
loggers                    `TensorBoard`, `WandB`
"""

from torchrecipes.training.activation_checkpointing import oom_hint
from torchrecipes.training.early_stopping import EarlyStopping
from torchrecipes.training.ema import EMA
from torchrecipes.training.expert_load_balancing import ExpertBalance, router_loss
from torchrecipes.training.few_shot import (
    FewShotConfig,
    few_shot_start,
    fit_output_layer,
    label_pairs,
    train_on_label_pairs,
)
from torchrecipes.training.forgetting import ForgettingConfig, ForgettingController, stored_baseline
from torchrecipes.training.frozen_features import FeatureCache
from torchrecipes.training.graceful_stop import GracefulStop
from torchrecipes.training.grad_cache import random_state, replay
from torchrecipes.training.guard import Guard
from torchrecipes.training.guide import embed_all, load_guide
from torchrecipes.training.metrics import LogConfig, MetricLogger, sum_over_ranks
from torchrecipes.training.result_card import write_card
from torchrecipes.training.run import ComputeConfig, start_run
from torchrecipes.training.setup import setup_model
from torchrecipes.training.trainable import describe_trainable, set_trainable

__all__ = [
    "EMA",
    "ComputeConfig",
    "EarlyStopping",
    "ExpertBalance",
    "FeatureCache",
    "FewShotConfig",
    "ForgettingConfig",
    "ForgettingController",
    "GracefulStop",
    "Guard",
    "LogConfig",
    "MetricLogger",
    "describe_trainable",
    "embed_all",
    "few_shot_start",
    "fit_output_layer",
    "label_pairs",
    "load_guide",
    "oom_hint",
    "random_state",
    "replay",
    "router_loss",
    "set_trainable",
    "setup_model",
    "start_run",
    "stored_baseline",
    "sum_over_ranks",
    "train_on_label_pairs",
    "write_card",
]
