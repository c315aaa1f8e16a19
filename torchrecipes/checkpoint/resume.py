"""Whether a run may go on from a checkpoint: the same network, the same data, and steps that are left."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from torchrecipes.errors import UserError
from torchrecipes.models.hub import meta_model_from_hf

if TYPE_CHECKING:
    from torchrecipes.checkpoint.checkpointer import Checkpoint


def check_same_architecture(path: Path, model: nn.Module) -> None:
    """Checks that a checkpoint is of this network; what only training uses, such as dropout, may have changed.

    Args:
        path: of the checkpoint.
        model: may be on the meta device, or sharded.

    Raises:
        UserError: it is of another one; the message names what differs.
    """
    stored_model = meta_model_from_hf(path)
    stored, ours = stored_model.state_dict(), model.state_dict()
    problems = [f"{name} is not in the checkpoint" for name in ours if name not in stored]
    problems += [f"{name} is not in this model" for name in stored if name not in ours]
    problems += [
        f"{name} is {list(stored[name].shape)} there and {list(ours[name].shape)} here"
        for name in ours
        if name in stored and stored[name].shape != ours[name].shape
    ]
    # The same shapes can be another network: other heads, another rope_theta. What only training uses may change.
    if not problems and type(stored_model.config) is type(model.config):
        there, here = asdict(stored_model.config), asdict(model.config)
        may_change = (
            "initializer_range",
            "max_position_embeddings",
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "attention_dropout",
            "attn_pdrop",
            "embd_pdrop",
            "resid_pdrop",
            "router_aux_loss_coef",
            "router_z_loss_coef",
        )
        problems = [
            f"{key} is {there[key]} there and {here[key]} here"
            for key in here
            if key not in may_change and there[key] != here[key]
        ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise UserError(f"{path} is a checkpoint of another model: {shown}. Give the settings it was trained with.")


def check_resumable(checkpoint: "Checkpoint", corpus, resume: str, max_steps: int | None = None) -> None:
    """Checks that a run goes on with the corpus that it was started with, and has steps left.

    Args:
        checkpoint: has the corpus' fingerprint as `state["corpus"]`.
        corpus: has `fingerprint` and `folder`.
        resume: the recipe's setting; a path was named on purpose, so there the corpus may be another one.
        max_steps: of the run; None: not known yet.

    Raises:
        UserError: it is another corpus, or the checkpoint is beyond the run's last step.
    """
    if max_steps is not None and checkpoint.step > max_steps:
        raise UserError(
            f"resume: {checkpoint.path} is of step {checkpoint.step:,}, and the run ends at step {max_steps:,}. Train "
            "for more steps, or take its weights alone: resume=auto output_dir=OTHER init_from=..."
        )
    if resume == "auto" and checkpoint.state.get("corpus") != corpus.fingerprint:
        raise UserError(
            f"{corpus.folder} is not the corpus that {checkpoint.path} was trained on: its order would be another one. "
            f"Bring the old corpus back, or go on on purpose: resume={checkpoint.path} output_dir=OTHER."
        )
