"""The autograd graph of an operator, kept without the large tensors that it saves.

Attention's backward reads q, k, v and o, which are slots with savers of their own, and beside them a number a query
(lse) and a random state. A hollow graph is what torch recorded, of whatever kernel it chose, with the former left out
until they are restored.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from hyclora.operators.entry import enter


class _Place:
    """Where the graph saves a tensor; it is there during a backward only."""

    tensor: Tensor | None

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


@dataclass
class HollowGraph:
    """inputs, end: edges of the graph. views: which of (*inputs, o) is saved, and as what view; others: the rest."""

    inputs: list[GradientEdge]
    end: GradientEdge
    views: list[tuple[_Place, int, Callable[[Tensor], Tensor]]]
    others: list[_Place]

    def backward(self, restored: list[Tensor], rest: list[Tensor], do: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the inputs from [*inputs, o] as restored, the rest as recorded, and the gradient of o."""
        for place, index, view in self.views:
            place.tensor = view(restored[index])
        for place, tensor in zip(self.others, rest, strict=True):
            place.tensor = tensor
        try:
            # the graph holds nothing else, and is whole for another backward
            return torch.autograd.grad(self.end, self.inputs, do, retain_graph=True)
        finally:
            self.empty()

    def empty(self) -> None:
        for place in (*(place for place, _, _ in self.views), *self.others):
            place.tensor = None


def record(run: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, HollowGraph | None, list[Tensor]]:
    """o = run(*inputs), its hollow graph, and the rest of what it saves, for the caller to keep.

    None and nothing where run saves parts or copies of its inputs, a map of the attention, or more than one number.
    Of flash attention the rest is lse, 4 H bytes a token, and a random state.
    """
    places: list[_Place] = []

    def pack(tensor: Tensor) -> _Place:
        places.append(_Place(tensor.detach()))
        return places[-1]

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda place: place.tensor):
        entries = enter(*inputs)
        o = run(*entries)
    edges, end, o = [get_gradient_edge(t) for t in entries], get_gradient_edge(o), o.detach()
    own = (*inputs, o)
    found = [next(((i, v) for i, t in enumerate(own) if (v := _view(place.tensor, t))), None) for place in places]
    views = [(place, *source) for place, source in zip(places, found, strict=True) if source is not None]
    others = [place for place, source in zip(places, found, strict=True) if source is None]
    rest = [place.tensor for place in others]
    graph = HollowGraph(edges, end, views, others)
    graph.empty()
    storages = {t.untyped_storage().data_ptr() for t in own}
    parts = any(t.untyped_storage().data_ptr() in storages or t.numel() >= o.numel() for t in rest)
    if parts or sum(t.is_floating_point() for t in rest) > 1:
        return o, None, []
    return o, graph, rest


def _view(saved: Tensor, source: Tensor) -> Callable[[Tensor], Tensor] | None:
    """How to view another tensor of source's shape as saved is one of source: all of it, dimensions moved or merged."""
    if saved.data_ptr() != source.data_ptr() or saved.numel() != source.numel():
        return None
    dims = {s: d for d, (n, s) in enumerate(zip(source.shape, source.stride(), strict=True)) if n > 1}
    shape, moved = saved.shape, [dims.get(s) if n > 1 else 0 for n, s in zip(saved.shape, saved.stride(), strict=True)]
    return None if None in moved else lambda t: t.as_strided(shape, [t.stride(d) for d in moved])
