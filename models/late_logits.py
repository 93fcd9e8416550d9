"""The logits of a training forward that had none, computed when somebody looks: as the stock model would have."""

from contextlib import nullcontext

import torch
from torch import Tensor

from hyclora.models.outputs import Deferred
from hyclora.models.sharding import is_sharded, local
from hyclora.operators.random_state import replayed_rng


class LateLogits:
    """The stock head on the hidden states of a forward, with the autocast, the grad mode and the dropout of then.

    head: the HeadBlock. again: of these hidden states makes those of a forward with Hugging Face's mask, which runs the
    decoder once more; for padded tokens that got others than in stock, which nobody was expected to look at. given: the
    tensors that it runs on. Keeps the hidden states as long as somebody keeps the outputs. ValueError if the model or
    these are not what they were.
    """

    def __init__(self, head, hidden: Tensor, dtype: torch.dtype | None, rng: Tensor | None, again=None, given=()):
        self.head, self.hidden, self.dtype, self.rng, self.again = head, hidden, dtype, rng, again
        self.projections = head.projections if again is not None else [head.head]
        self.given = [t for t in given if isinstance(t, Tensor)] if again is not None else []
        projections = [head.head, *head.adapted] if again is not None else [head.head]
        if is_sharded(head.module):  # what layers have read of themselves may not be there any more
            for p in {*projections, *self.projections}:
                p.refresh()
        self.adapters = [local(t) for p in projections if p.has_adapter for t in p.parameters()[:2]]
        self.state, self.contents = self._state(), self._contents()

    def defer(self) -> Deferred:
        return Deferred(self, self.dtype or self.hidden.dtype)

    def __call__(self) -> Tensor:
        self._check()
        device = self.hidden.device
        autocast = torch.autocast(device.type, self.dtype, enabled=self.dtype is not None)
        with torch.enable_grad(), autocast:
            hidden = self.hidden if self.again is None else self.again(self.hidden)
            with nullcontext() if self.rng is None else replayed_rng(device, self.rng):
                return self.head.head.module(hidden)

    def _state(self) -> list:
        """What the logits depend on, beside the hidden states, and cannot be had again once it has changed."""
        read = [t for p in self.projections for t in (p.base.weight, *p.parameters()) if t is not None]
        adapters = [(p.adapter, p.scaling, p.dropout) for p in self.projections]
        return [adapters, *((id(t), t._version) for t in (*read, *self.given))]

    @torch.no_grad()
    def _contents(self) -> list[Tensor]:
        """Norms of the adapters: optimizers that write to .data, as bitsandbytes' do, change no version."""
        return list(torch._foreach_norm(self.adapters)) if self.adapters else []

    def _check(self) -> None:
        active = all([p.refresh() for p in self.projections])
        same = active and self.state == self._state() and (self.again is None or self.head.module.training)
        if same and all(map(torch.equal, self.contents, self._contents())):
            return
        why = "" if self.again is None else "those of padded tokens take a second forward, "
        raise ValueError(
            f"{self.head.name}: outputs.logits are computed when they are first looked at; {why}and the model was "
            "trained or switched over since the forward, or its inputs overwritten. Look at them before that"
        )
