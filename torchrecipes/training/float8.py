"""Matrix products of 8-bit floats (Micikevicius et al. 2022, arXiv:2209.05433): torchao's float8 training.

Inputs, weights and gradients of a linear layer are scaled to the range of float8, rounded, and multiplied, which a GPU
does twice as fast as in bf16. Weights, their gradients and the optimizer stay in fp32; all else computes in bf16.
Scales come from the tensor at hand, so there is no state: checkpoints and exports are those of any other run.
"""

from dataclasses import replace

import torch
from torch import nn

from torchrecipes.errors import UserError
from torchrecipes.modules.blocks import transformer_blocks
from torchrecipes.torchao_import import import_torchao

RECIPES = {"float8": "tensorwise", "float8_rowwise": "rowwise"}  # names of torchao's Float8LinearRecipeName
CAPABILITY = {"float8": (8, 9), "float8_rowwise": (9, 0)}  # of the first GPUs that multiply so
_HEADS = {"head", "lm_head"}  # of a model without repeated blocks, which is converted as a whole
MULTIPLE = 16  # that both sizes of a weight must be, for the matrix products of the hardware


def check_float8(precision: str, device: torch.device, emulate: bool = False) -> None:
    """Checks that the device can compute in a precision of `RECIPES`.

    Args:
        precision: `float8` or `float8_rowwise`.
        device: where the model will run.
        emulate: whether float8 is emulated, which any device can.

    Raises:
        UserError: it cannot: says why, and what to use.
    """
    if emulate:
        return
    needed = CAPABILITY[precision]
    remedy = "Use precision=bf16; emulate_float8=true computes the same numbers anywhere, slowly, for tests."
    needs = f"precision={precision} needs an NVIDIA GPU of compute capability {needed[0]}.{needed[1]} or higher"
    if device.type != "cuda":
        raise UserError(f"{needs}, and this run is on {device.type}. {remedy}")
    found = torch.cuda.get_device_capability(device)
    if found < needed:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"{needs}, and {name} has {found[0]}.{found[1]}. {remedy}")


def convert_to_float8(model: nn.Module, precision: str, *, device: torch.device, emulate: bool = False) -> int:
    """Lets linear layers of `model.blocks` compute in float8, in place. Call it before anything wraps the blocks.

    Layers whose sizes are no multiples of 16, or so small that rounding costs more than the product gains, stay as they
    are; so do embedding and head. Parameters and their names stay. Without `compile` the rounding is not fused, and
    float8 is slower than bf16. The tokens of a micro-batch have to be a multiple of 16.

    Args:
        model: has `blocks`; on any device, `meta` too.
        precision: `float8` scales a tensor as a whole, `float8_rowwise` its rows and columns by themselves, which is
            more exact and less fast. For any other name nothing happens.
        device: where it will run.
        emulate: rounds to float8, and multiplies in fp32, on any device; layers of any size are converted.

    Returns:
        The number of layers that compute in float8.

    Raises:
        UserError: the device cannot, or no layer is large enough.
    """
    if precision not in RECIPES:
        return 0
    check_float8(precision, device, emulate)
    float8 = import_torchao("float8")
    config = float8.Float8LinearConfig.from_recipe_name(RECIPES[precision])
    if emulate:
        config = replace(config, emulate=True)

    def chosen(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or any(size % MULTIPLE for size in module.weight.shape):
            return False
        return name.partition(".")[0] not in _HEADS and (emulate or _pays(precision, *module.weight.shape))

    blocks = transformer_blocks(model)
    part = blocks if isinstance(blocks, nn.Module) else model
    float8.convert_to_float8_training(part, module_filter_fn=chosen, config=config)
    kind = import_torchao("float8.float8_linear").Float8Linear
    converted = sum(isinstance(module, kind) for module in part.modules())
    if not converted:
        raise UserError(
            f"precision={precision}: no linear layer of the model's blocks is large enough to be faster in float8, or "
            f"their sizes are no multiples of {MULTIPLE}. Use precision=bf16, or a larger model."
        )
    return converted


def _pays(precision: str, out_features: int, in_features: int) -> bool:
    """Whether such a layer is faster in float8 than in bf16.

    The limits are torchao's, from its measurements on an H100: `_auto_filter_for_recipe` in version 0.18, tables in
    https://github.com/pytorch/ao/tree/main/torchao/float8#performance.
    """
    if precision == "float8":
        return in_features > 4096 or out_features > 1024
    return out_features > 2048 and in_features > 1024 and (out_features > 4096 or in_features > 2048)
