"""Training with float8 matrix products (Micikevicius et al. 2022, arXiv:2209.05433), through torchao.

Inputs, weights and gradients of a linear layer are scaled to the range of float8, rounded and multiplied, which a GPU
does twice as fast as in bf16. Weights, their gradients and the optimizer stay in fp32; everything else computes in
bf16. Scales are computed from each tensor, so there is no state, and checkpoints do not differ from those of bf16.
"""

from dataclasses import replace

import torch
from torch import nn

from torchrecipes.errors import UserError
from torchrecipes.modules.blocks import transformer_blocks
from torchrecipes.modules.lora import LoRALinear
from torchrecipes.torchao_import import import_torchao

RECIPES = {"float8": "tensorwise", "float8_rowwise": "rowwise"}  # names of torchao's Float8LinearRecipeName
CAPABILITY = {"float8": (8, 9), "float8_rowwise": (9, 0)}  # compute capability of the first GPUs that have it
MULTIPLE = 16  # the hardware's matrix products need multiples of it
MEASURED = "torchao on an H100: 0.80 times bf16's speed for 1024 x 2048 x 1024, 1.39 times for 4096 x 8192 x 16384"
_HEADS = {"head", "lm_head"}  # of a model without repeated blocks, which is converted as a whole


def check_float8(precision: str, device: torch.device, emulate: bool = False) -> None:
    """Checks that the device can compute in a precision of `RECIPES`.

    Args:
        precision: `float8` or `float8_rowwise`.
        device: where the model will run.
        emulate: float8 is emulated, which works on any device.

    Raises:
        UserError: it cannot (code `no_float8`).
    """
    if emulate:
        return
    needed, actual = CAPABILITY[precision], f"this run is on {device.type}"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= needed:
            return
        actual = f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
    raise UserError(
        f"{precision} needs an NVIDIA GPU of compute capability {needed[0]}.{needed[1]} or higher, and {actual}",
        key="compute.precision",
        hint="Use bf16. For tests, compute.emulate_float8=true computes the same numbers on any device, slowly.",
        code="no_float8",
    )


def convert_to_float8(model: nn.Module, precision: str, *, device: torch.device, emulate: bool = False) -> int:
    """Converts linear layers of the model's blocks to float8, in place. Call it before anything wraps the blocks.

    Layers whose sizes are no multiples of 16, or so small that rounding costs more than the product gains, stay as they
    are, and so do layers with LoRA, embedding and head. Parameters and their names stay. Without `compile` the rounding
    is not fused, and float8 is slower than bf16. The number of tokens in a micro-batch must be a multiple of 16.

    Args:
        model: any module, on any device, `meta` too.
        precision: `float8` scales each tensor, `float8_rowwise` each row and column, which is more exact and slower.
            With any other name nothing happens.
        device: where the model will run.
        emulate: rounds to float8 and multiplies in fp32, on any device; converts layers of any size.

    Returns:
        The number of converted layers.

    Raises:
        UserError: the device does not have float8, or no layer is large enough.
    """
    if precision not in RECIPES:
        return 0
    check_float8(precision, device, emulate)
    float8 = import_torchao("float8")
    config = float8.Float8LinearConfig.from_recipe_name(RECIPES[precision])
    if emulate:
        config = replace(config, emulate=True)

    def chosen(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or isinstance(module, LoRALinear):
            return False
        if any(size % MULTIPLE for size in module.weight.shape):
            return False
        return name.partition(".")[0] not in _HEADS and (emulate or _pays(precision, *module.weight.shape))

    blocks = transformer_blocks(model)
    part = blocks if isinstance(blocks, nn.Module) else model
    float8.convert_to_float8_training(part, module_filter_fn=chosen, config=config)
    kind = import_torchao("float8.float8_linear").Float8Linear
    converted = sum(isinstance(module, kind) for module in part.modules())
    if not converted:
        raise UserError(
            "no linear layer of the model's blocks is large enough to be faster in float8 than in bf16, or their sizes "
            f"are no multiples of {MULTIPLE} ({MEASURED})",
            key="compute.precision",
            hint="Use bf16, or a larger model.",
            code="nothing_to_convert",
        )
    return converted


def _pays(precision: str, out_features: int, in_features: int) -> bool:
    """Whether a layer is faster in float8 than in bf16.

    The limits are torchao's, from its measurements on an H100: `_auto_filter_for_recipe` in version 0.18, tables in
    https://github.com/pytorch/ao/tree/main/torchao/float8#performance.
    """
    if precision == "float8":
        return in_features > 4096 or out_features > 1024
    return out_features > 2048 and in_features > 1024 and (out_features > 4096 or in_features > 2048)
