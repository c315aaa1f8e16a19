"""`UserError`: a mistake of the user, as opposed to a bug, and its message on the command line."""

import errno
from collections.abc import Sequence
from typing import Any


class UserError(Exception):
    """A mistake of the user: the problem, its place, and the remedy.

    The command line prints it without a traceback and exits with code 2 (`--debug` shows the traceback). A bug is an
    `assert` or a `ValueError`, never this.

    Args:
        problem: the mistake, naming the file, line or value.
        key: the config key or command-line option at fault, such as `optimizer.lr`.
        hint: the remedy.
        code: a short name of the kind of mistake, such as `corrupt_checkpoint`, for programs and tests.
        problems: the mistakes that this one lists, if there are several.
    """

    def __init__(
        self,
        problem: str,
        *,
        key: str | None = None,
        hint: str | None = None,
        code: str | None = None,
        problems: "Sequence[UserError]" = (),
    ):
        super().__init__(problem)
        self.problem, self.key, self.hint, self.code, self.problems = problem, key, hint, code, tuple(problems)

    def __str__(self) -> str:
        text = f"{self.key}: {self.problem}" if self.key else self.problem
        if not self.hint:
            return text
        if "\n" in text:  # a list
            return f"{text}\n{self.hint}"
        return f"{text}{'' if text.endswith(('.', ':', '?')) else '.'} {self.hint}"

    def under(self, key: str) -> "UserError":
        """Return the same mistake with `key` before its own: `lr` becomes `optimizer.lr`."""
        inner = f"{key}.{self.key}" if self.key else key
        return UserError(self.problem, key=inner, hint=self.hint, code=self.code, problems=self.problems)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, to send the mistake to other processes."""
        fields = {name: getattr(self, name) for name in ("problem", "key", "hint", "code")}
        return fields | {"problems": [problem.to_dict() for problem in self.problems]}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "UserError":
        """Return the mistake that `to_dict` described."""
        problems = [cls.from_dict(problem) for problem in fields["problems"]]
        return cls(**{name: fields[name] for name in ("problem", "key", "hint", "code")}, problems=problems)


def format_user_error(error: BaseException) -> str | None:
    """Return the message of an error that a user can fix, or None for a bug.

    These are a `UserError`, a full disk, and too little memory on the host or the GPU.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" (writing {error.filename})" if error.filename else ""
        return f"The disk is full{where}. Make room or give another output_dir, then run the same command again."
    # torch is not imported here, so its class is known by name; its CPU allocator raises a plain RuntimeError.
    gpu = type(error).__name__ == "OutOfMemoryError"
    if (
        gpu
        or isinstance(error, MemoryError)
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    ):
        detail = str(error).split("\n", 1)[0]
        what = f"Out of memory{' on the GPU' if gpu else ''}{f' ({detail})' if detail else ''}."
        return (
            f"{what} Lower micro_batch_size first, or --batch-size where there is none, "
            "then seq_len or the model's size."
        )
    return None
