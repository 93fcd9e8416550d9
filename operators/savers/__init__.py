"""How one buffered activation (a slot) is kept between forward and backward.

One file a way of keeping; store.py, buffers.py and host.py are where the packed bytes wait, if not on the GPU.
"""

from operators.savers.base import Derived, Keeper, Recompute, Saver, Step
from operators.savers.channel_quant import ChannelQuant
from operators.savers.exact import Exact
from operators.savers.host import CudaCopies
from operators.savers.observer import Observer
from operators.savers.sparse import Sparse
from operators.savers.store import UNITS_A_LAYER, Store

__all__ = [
    "UNITS_A_LAYER", "ChannelQuant", "CudaCopies", "Derived", "Exact", "Keeper", "Observer", "Recompute", "Saver",
    "Sparse", "Step", "Store", "make_saver",
]  # fmt: skip


def make_saver(name: str, *, scale_rule: str, outlier_ratio: float, softmax_outlier_ratio: float) -> Saver:
    """Saver of a name: exact, sparse, derived, recompute, or quant2 / quant3 / quant4 / quant8."""
    if name.startswith("quant"):
        return ChannelQuant(int(name.removeprefix("quant")), scale_rule, outlier_ratio)
    if name == "sparse":
        return Sparse(softmax_outlier_ratio)
    return {"exact": Exact, "derived": Derived, "recompute": Recompute}[name]()
