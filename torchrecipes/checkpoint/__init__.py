"""Checkpoints that survive a power cut.

checkpointer      `Checkpointer`: saves, finds and restores the checkpoints of a run
manifest          the files of a checkpoint with sizes and checksums
optimizer_state   an optimizer's state by parameter names
quantized_state   8- and 4-bit optimizer state as plain tensors
resume            checks that a checkpoint can be resumed
"""

from torchrecipes.checkpoint.checkpointer import CheckpointConfig, Checkpointer, KeepBest, find_checkpoint
from torchrecipes.checkpoint.manifest import verify

__all__ = ["CheckpointConfig", "Checkpointer", "KeepBest", "find_checkpoint", "verify"]
