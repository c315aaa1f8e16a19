"""Checkpoints that survive a power cut.

checkpointer      `Checkpointer`: saves and restores the checkpoints of a run
write             a checkpoint's files, and the name by which it becomes visible
restore           model, optimizer, state and random generators from a checkpoint
find              which checkpoint a run resumes from
best              the best checkpoint by a metric
result            a run's result as a model folder
tensor_files      tensors as safetensors files, sharded or not
state             nested state as JSON and tensors
optimizer_state   an optimizer's state by parameter names
quantized_state   8- and 4-bit optimizer state as plain tensors
random_state      random generators of all ranks
resume            checks that a checkpoint can be resumed, and reports a changed recipe
"""

from torchrecipes.checkpoint.best import KeepBest
from torchrecipes.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from torchrecipes.checkpoint.find import find_checkpoint, stored_length
from torchrecipes.checkpoint.result import run_result
from torchrecipes.manifest import verify

__all__ = [
    "CheckpointConfig",
    "Checkpointer",
    "KeepBest",
    "find_checkpoint",
    "run_result",
    "stored_length",
    "verify",
]
