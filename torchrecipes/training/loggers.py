"""Loggers for `log.loggers`, beside metrics.jsonl: TensorBoard and Weights & Biases.

A logger is any object with `log(values, step)` and `close()`.
"""

from pathlib import Path

import xxhash

from torchrecipes.errors import UserError


class TensorBoard:
    """Event files for TensorBoard: `tensorboard --logdir runs`.

    Args:
        output_dir: the run's folder; given by the recipe.
        folder: where the files go; None: `<output_dir>/tensorboard`.

    Raises:
        UserError: the package is not installed.
    """

    requires = "tensorboard"  # checked before a run starts

    def __init__(self, output_dir: str, folder: str | None = None):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "TensorBoard needs its package",
                key="log.loggers",
                hint="pip install tensorboard",
                code="missing_package",
            ) from None
        self.writer = SummaryWriter(folder or str(Path(output_dir) / "tensorboard"))

    def log(self, values: dict[str, float], step: int) -> None:
        """Writes every value except the step itself."""
        for name, value in values.items():
            if name != "step":
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the file."""
        self.writer.close()


class WandB:
    """Weights & Biases.

    Args:
        project: the project there.
        output_dir: the run's folder; given by the recipe. Its name is the run's name unless `name` is given.
        name: the run's name there.
        mode: `online`, `offline` (sent later with `wandb sync`) or `disabled`.

    Raises:
        UserError: the package is not installed.
    """

    requires = "wandb"  # checked before a run starts

    def __init__(self, project: str, output_dir: str, name: str | None = None, mode: str = "online"):
        try:
            import wandb
        except ImportError:
            raise UserError(
                "WandB needs its package", key="log.loggers", hint="pip install wandb", code="missing_package"
            ) from None
        folder = Path(output_dir)
        # A resumed run is in the same folder, and continues the same curve.
        identity = xxhash.xxh3_64_hexdigest(str(folder.resolve()).encode())
        self.run = wandb.init(
            project=project, name=name or folder.name, id=identity, dir=str(folder), mode=mode, resume="allow"
        )

    def log(self, values: dict[str, float], step: int) -> None:
        """Sends the values."""
        self.run.log(values, step=step)

    def close(self) -> None:
        """Waits until everything is sent."""
        self.run.finish()
