"""What a program of a kernel that packs or unpacks takes: rows and groups, and how many warps it has."""

from hyclora.operators.dispatch import cdiv, next_power_of_2
from hyclora.operators.packing.codebook import GROUP, Codebook

# the fastest of those tried on an H200 and an H100, in groups of GROUP channels
PACK_TILE = {"ROWS": 4, "BLOCK_GROUPS": 16, "num_warps": 2}
UNPACK_TILE = {"ROWS": 8, "BLOCK_GROUPS": 4, "num_warps": 1}


def tile_of(tile: dict, book: Codebook) -> dict:
    """A tile of as many channels in this book's groups, one group at least."""
    return tile | {"BLOCK_GROUPS": max(1, tile["BLOCK_GROUPS"] * GROUP // book.group)}


def grid_of(n_rows: int, n_groups: int, tile: dict) -> tuple[int]:
    """As many programs as there are tiles."""
    return (cdiv(n_rows, tile["ROWS"]) * cdiv(n_groups, tile["BLOCK_GROUPS"]),)


def row_constants(n_groups: int, book: Codebook, n_outliers: int) -> dict:
    """Tile of a kernel whose programs take whole rows."""
    block = next_power_of_2(n_groups)
    return {
        "BLOCK_GROUPS": block,
        "BLOCK_OUTLIERS": next_power_of_2(max(n_outliers, 1)),
        "num_warps": min(16, max(1, block * book.group // 256)),
    }
