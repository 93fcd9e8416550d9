"""How one buffered activation (a slot) is kept between forward and backward: one file a way of keeping.

exact.py          the tensor itself                          base.py       what a saver is; Recompute, Derived; Keeper
channel_quant.py  codes of b bits, scales, exact channels    observer.py   calibration on tiles before they are packed
sparse.py         the largest entries of attention rows      gauge.py      whether statistics still fit
measure.py        what calibration sees of tokens             difference.py layer inputs as differences, in chains

Where the packed bytes wait, if not on the GPU, is operators/store.
"""

from hyclora.operators.packing.codebook import GROUP
from hyclora.operators.savers.base import Derived, Keeper, Recompute, Saver, Source, Step
from hyclora.operators.savers.channel_quant import ChannelQuant
from hyclora.operators.savers.difference import Difference, InputKeeper
from hyclora.operators.savers.exact import Exact
from hyclora.operators.savers.gauge import GaugedQuant, Readback
from hyclora.operators.savers.observer import Observer
from hyclora.operators.savers.sparse import Sparse

__all__ = [
    "ChannelQuant", "Derived", "Difference", "Exact", "GaugedQuant", "InputKeeper", "Keeper", "Observer", "Readback",
    "Recompute", "Saver", "Source", "Sparse", "Step", "make_saver",
]  # fmt: skip


def make_saver(
    name: str, *, scale_rule: str, outlier_ratio: float, softmax_outlier_ratio: float, group: int = GROUP,
    gauged: bool = False, difference: bool = False,
) -> Saver:  # fmt: skip
    """Saver of a name: exact, sparse, derived, recompute, or quant2 / quant3 / quant4 / quant8, gauged if so.

    group: channels of a quantizer's group. difference: what a quantizer is given is one.
    """
    if name.startswith("quant"):
        plain = Difference if difference else ChannelQuant
        kind = GaugedQuant if gauged and scale_rule != "paper" else plain
        return kind(int(name.removeprefix("quant")), scale_rule, outlier_ratio, group)
    if name == "sparse":
        return Sparse(softmax_outlier_ratio)
    return {"exact": Exact, "derived": Derived, "recompute": Recompute}[name]()
