"""Layer inputs as chains of differences: the first of a chain by itself, each other to what is restored of that before.

A layer adds a little to what it is given, so the difference between inputs of neighbours has a smaller range than an
input, and the same bits err less. Of the inputs x_0, x_1, ... of a chain, with K for a quantizer and back,

    r_0 = K(x_0)        r_l = r_{l-1} + K(x_l - r_{l-1})

Errors do not add up, as each difference is to what backward will have. That adds the links of a chain in the order of
the forward, in its dtype, and so restores the same bits; links are there until their own layer's backward anyway. To
walk from r_l down to r_{l-1} would be one addition in place of l, but rounds otherwise, keeps the last r_l whole, and
has another hidden state beside the layer that is run again. So a chain is short instead.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hyclora.operators.savers.base import Keeper, Saver, Source, Step
from hyclora.operators.savers.channel_quant import ChannelQuant
from hyclora.operators.savers.exact import Exact
from hyclora.operators.store.store import Store, redeem, ticket

SLOT, LINK, TICKET = "layer_in", "link ", "ticket "
SAID = "difference in "  # of what statistics are, as checkpoints have it


class Difference(ChannelQuant):
    """A ChannelQuant that is given, and calibrated on, differences; an InputKeeper makes them and adds them up."""

    def __str__(self) -> str:
        return SAID + super().__str__()


@dataclass(frozen=True)
class Restored:
    """An input x [T, C] as backward will have it, for the layer after alone, and the links of which it is the sum."""

    x: Tensor
    links: tuple[Source, ...]


class InputKeeper(Keeper):
    """Keeps a layer's input; as its difference to the one before if its saver is a Difference.

    What was restored comes from the layer before, and goes to the one after if leads, in Step.restored: within a
    forward of the decoder alone, 2 bytes an element of 16 bits. Where nothing has come, or of another shape, as a layer
    is called by itself, a difference cannot be made, and the input is kept as it is. Links are kept by reference.
    restore() has for a time the sum and a link of 16 bits, and gets those that are in a store one by one.
    """

    def __init__(
        self, savers: dict[str, Saver], step: Step | None, store: Store | None = None, span: int = 1,
        leads: bool = False,
    ):  # fmt: skip
        super().__init__(savers, step, store, span)
        self.leads = leads
        self._links: tuple[Source, ...] = ()
        self._sum: Tensor | None = None

    def keep(self, name: str, x: Tensor) -> None:
        before, self.step.restored = self.step.restored, None
        base = None
        if isinstance(self.savers[name], Difference):
            if before is not None and before.x.shape == x.shape:
                base, self._links = before.x.to(x.device, x.dtype), before.links
            else:
                self.savers = {name: Exact()}
        super().keep(name, x if base is None else x - base)
        for i, link in enumerate(self._links):
            self._share(i, link)
        if self.leads and self.step.running is not None and not self.aliases(name):
            own = self.restore_rows(name, slice(0, len(x)), x.dtype)
            self._sum = own if base is None else base.add_(own)

    def save(self, ctx) -> None:
        super().save(ctx)
        if self._sum is not None:
            self.step.restored = Restored(self._sum, (*self._links, self.source(SLOT)))
            self._sum = None

    def restore(self, name: str, dtype: torch.dtype | None = None) -> Tensor | None:
        total = None
        for i in range(sum(key.startswith(LINK) for key in self._layout)):
            total = _add(total, self._fetch(i))
        return _add(total, super().restore(name, dtype))

    def _share(self, i: int, link: Source) -> None:
        """Hold a link of another layer, which is not fetched with this layer's own slot but by itself."""
        self._add(f"{LINK}{i}", link.packed, link.shape, link.dtype, link.saver)
        homes = {place: home for place, home in enumerate(link.homes) if home is not None}
        if homes:
            self.keep_exact(f"{TICKET}{i}", ticket(homes))

    def _fetch(self, i: int) -> Tensor:
        first = self._layout[f"{LINK}{i}"][0]
        empty = self.exact(f"{TICKET}{i}")
        if empty is not None:
            for place, tensor in redeem(empty, ahead=0).items():
                self._tensors[first + place] = tensor
        return super().restore(f"{LINK}{i}")


def _add(total: Tensor | None, link: Tensor) -> Tensor:
    return link if total is None else total.to(link.device, link.dtype).add_(link)
