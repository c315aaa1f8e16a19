"""The one exception that stands for a user's mistake, as against a bug in this library, and how mistakes are told."""

import errno


class UserError(Exception):
    """What a user got wrong: one message that says what, where (file:line or key), and what to do.

    The command line prints the message without a traceback and exits with code 2 (`--debug` shows the traceback).
    Any part of the package may raise it. What can only be a bug is an `assert` or a `ValueError`, never this.
    """


def explain(error: BaseException) -> str | None:
    """Return the plain message for an error that a user can do something about, or None for what is a bug.

    Besides a `UserError` these are a full disk and too little memory, on the host or on the GPU.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" (writing {error.filename})" if error.filename else ""
        return f"The disk is full{where}. Make room, or set output_dir to another disk, and run the same command again."
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
            f"{what} Lower rows_per_micro_batch first, or --batch-size where there is none (same result), "
            "then seq_len or the model's size."
        )
    return None
