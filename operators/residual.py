"""The residual branch around a block."""

import torch
from torch import Tensor


def add_residual(y: Tensor, residual: Tensor | None) -> Tensor:
    """residual + y, in y's memory unless the sum is of a wider dtype; y itself without a residual."""
    if residual is None:
        return y
    return y.add_(residual) if torch.promote_types(y.dtype, residual.dtype) == y.dtype else residual + y
