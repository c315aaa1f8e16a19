"""What is wrong with the keys that every recipe has, where their types say too little."""

from typing import Any

AT_LEAST_ONE = (
    "seq_len global_batch_size micro_batch_size log_every eval_every eval_sequences save_every keep_last sample_every "
    "sample_tokens"
).split()
NOT_NEGATIVE = "z_loss label_smoothing router_bias_update_rate".split()


def check_common_keys(config: Any) -> list[str]:
    """Checks a recipe's config.

    Args:
        config: a recipe's dataclass with the keys that all recipes have, and some that not all have.

    Returns:
        One line per problem, each with its key first.
    """
    values = {name: getattr(config, name, None) for name in (*AT_LEAST_ONE, *NOT_NEGATIVE)}
    low = [name for name in AT_LEAST_ONE if isinstance(values[name], int) and values[name] < 1]
    problems = [f"{name}: {values[name]} is not 1 or more (what is optional is off with null)" for name in low]
    problems += [
        f"{name}: {values[name]} is not 0 or more"
        for name in NOT_NEGATIVE
        if values[name] is not None and values[name] < 0
    ]
    if (values["label_smoothing"] or 0) >= 1:
        problems.append(f"label_smoothing: {values['label_smoothing']} is not below 1; it is a share, such as 0.1")
    fraction, masked = config.data.validation_fraction, getattr(config.data, "mlm_probability", 0.2)
    if not 0 <= fraction < 1:
        problems.append(f"data.validation_fraction: {fraction} is not a share of the documents, from 0 to below 1")
    if not 0 < masked < 1:
        problems.append(f"data.mlm_probability: {masked} is not a share of the tokens, between 0 and 1")
    if config.max_grad_norm is not None and config.max_grad_norm <= 0:
        problems.append(f"max_grad_norm: {config.max_grad_norm} is not above 0 (it is off with null)")
    if config.eval_every and not config.data.validation_fraction and not config.data.validation_source:
        problems.append("eval_every: there is no text to evaluate on (data.validation_fraction=0); set it to null")
    if getattr(config, "sample_every", None) and not config.sample_prompts:
        problems.append("sample_prompts: there is none; give one at least, as in sample_prompts=['']")
    if config.data.num_workers < 0:
        problems.append(f"data.num_workers: {config.data.num_workers} is not 0 or more")
    if config.precision.startswith("float8") and config.seq_len % 16:
        problems.append(f"seq_len: {config.seq_len} is not a multiple of 16, which precision={config.precision} needs")
    problems += [
        f"{name}: {getattr(config, name)} is not above 0"
        for name in ("max_steps", "total_tokens", "epochs")
        if getattr(config, name) is not None and getattr(config, name) <= 0
    ]
    budgets = [name for name in ("max_steps", "total_tokens", "epochs") if getattr(config, name) is not None]
    if len(budgets) != 1:
        which = f"{' and '.join(budgets)} are set" if budgets else "none of max_steps, total_tokens, epochs is set"
        problems.append(f"{which}: set exactly one, the others to null, as in max_steps=1000 epochs=null")
    return problems
