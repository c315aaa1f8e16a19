"""Feed-forward layers."""

import torch.nn.functional as F
from torch import Tensor, nn

from torchrecipes.modules.cpu.gelu import gelu_tanh


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202), gate and up in one projection.

    Parameters: `gate_up_proj` (rows: gate, then up) and `down_proj`, with biases if `bias`.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False):
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.row_splits = {"gate_up_proj.weight": (intermediate_size, intermediate_size)}  # two matrices, for Muon
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x `[..., D]`."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class GeGLU(nn.Module):
    """`down(gelu(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202), with the exact GELU.

    Parameters: those of `SwiGLU`.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False):
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.row_splits = {"gate_up_proj.weight": (intermediate_size, intermediate_size)}  # two matrices, for Muon
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x `[..., D]`."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.gelu(gate) * up)


class GeluMLP(nn.Module):
    """`down(gelu(up(x)))` with biases.

    Args:
        hidden_size, intermediate_size: D and I.
        approximate: `none` is the exact GELU of BERT, `tanh` the approximation of GPT-2 (`gelu_new`).
    """

    def __init__(self, hidden_size: int, intermediate_size: int, approximate: str = "none"):
        super().__init__()
        self.approximate = approximate
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x `[..., D]`."""
        up = self.up_proj(x)
        return self.down_proj(gelu_tanh(up) if self.approximate == "tanh" else F.gelu(up))
