"""Long inputs in tiles of tokens, so that what lives only inside of an operator does not grow with them."""

from torch import Tensor

# W is dequantized once a tile: 1 to 2% of the time of a tile's GEMMs. Inputs that are not longer are a single tile
TILE_TOKENS = 16384


def token_tiles(n_rows: int) -> list[slice]:
    """The rows of each tile, in order; there is always a first one."""
    return [slice(start, min(start + TILE_TOKENS, n_rows)) for start in range(0, max(n_rows, 1), TILE_TOKENS)]


def place(whole: Tensor | None, tile: Tensor | None, rows: slice, n_rows: int) -> Tensor | None:
    """A tensor of n_rows with the tile at its rows; whole: what the tiles before it gave, None for the first."""
    if tile is None or len(tile) == n_rows:
        return tile
    whole = tile.new_empty(n_rows, *tile.shape[1:]) if whole is None else whole
    whole[rows] = tile
    return whole
