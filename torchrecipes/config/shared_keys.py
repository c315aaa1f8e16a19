"""Cross-field validation of the keys that every recipe has."""

from typing import Any

from torchrecipes.errors import UserError


def check_shared_keys(config: Any) -> list[UserError]:
    """Return the problems that only two keys together show; a rule applies where a config has its keys."""
    problems = []
    names = [name for name in ("max_steps", "total_tokens", "epochs", "max_minutes") if hasattr(config, name)]
    if len(names) >= 3:
        given = [name for name in names if getattr(config, name) is not None]
        if len(given) != 1:
            problems.append(
                UserError(
                    f"{' and '.join(given)} are set" if given else f"none of {', '.join(names)} is set",
                    key=given[-1] if given else "max_steps",
                    hint="Set exactly one, the others to null, as in max_steps=1000 epochs=null",
                    code="run_length",
                )
            )
    data = getattr(config, "data", None)
    has_keys = hasattr(config, "eval_every") and hasattr(data, "validation_fraction")
    if has_keys and config.eval_every and not data.validation_fraction and not data.validation_source:
        problems.append(
            UserError(
                "there is no text to evaluate on: data.validation_fraction is 0",
                key="eval_every",
                hint="Set eval_every=null, or hold text out",
                code="no_validation_text",
            )
        )
    checkpoint = getattr(config, "checkpoint", None)
    if getattr(checkpoint, "keep_best", None) and not getattr(config, "eval_every", True):
        problems.append(
            UserError(
                "nothing is evaluated, so no checkpoint is the best one: eval_every is null",
                key="checkpoint.keep_best",
                hint="Set eval_every, or checkpoint.keep_best=null",
                code="no_evaluation",
            )
        )
    precision = str(getattr(getattr(config, "compute", None), "precision", ""))
    if precision.startswith("float8") and config.seq_len % 16:
        problems.append(
            UserError(
                f"{config.seq_len} is not a multiple of 16, which compute.precision={precision} needs",
                key="seq_len",
                code="not_a_multiple",
            )
        )
    return problems
