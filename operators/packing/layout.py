"""Where the packed bytes of a slot are: shapes of codes and scales, and one allocation for what is packed together."""

import math
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from hyclora.operators.dispatch import cdiv
from hyclora.operators.packing.codebook import Codebook


def carve(parts: list[tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> list[Tensor]:
    """Uninitialised tensors of these shapes and dtypes in one allocation, each at a multiple of 16 bytes.

    What is packed together travels together: a store copies one piece of memory instead of many small ones. The bytes
    are those of the tensors, each rounded up to a multiple of 16.
    """
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in parts]
    starts = [0, *accumulate(-(-size // 16) * 16 for size in sizes)]
    buffer = torch.empty(starts[-1], dtype=torch.uint8, device=device)
    tensors = []
    for (shape, dtype), start in zip(parts, starts, strict=False):
        whole = buffer if dtype == torch.uint8 else buffer.view(dtype)
        strides = [*reversed([*accumulate(reversed(shape[1:]), mul, initial=1)])]
        tensors.append(whole.as_strided(shape, strides, start // dtype.itemsize))
    return tensors


def packed_shapes(n_rows: int, n_cols: int, book: Codebook) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Codes uint8 [T, n, G/8, b] and scale uint8 [T, n, 2] ([T, 0, 2] without): G b / 8 + 2 bytes a group."""
    n_groups = cdiv(n_cols, book.group)
    codes = (n_rows, n_groups, book.group // 8, book.bits)
    return [(codes, torch.uint8), ((n_rows, n_groups * book.grouped, 2), torch.uint8)]
