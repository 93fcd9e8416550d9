"""Where packed slots wait if not on the GPU: pinned host memory, copied beside the computation.

store.py        units of slots, sent away and fetched in time           host.py   pinned memory, and the copies
buffers.py      tensors as the bytes that are copied
"""

from hyclora.operators.store.host import CudaCopies
from hyclora.operators.store.store import UNITS_A_LAYER, Store

__all__ = ["UNITS_A_LAYER", "CudaCopies", "Store"]
