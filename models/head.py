"""The block of a causal LM: decoder, then LM head and loss chunk by chunk, so that training has no logits.

They are there for whoever looks at them (outputs.py, late_logits.py).
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from transformers.utils import can_return_tuple

from hyclora.models.blocks import Block, autocast_dtype, projection
from hyclora.models.families.family import Family
from hyclora.models.late_logits import LateLogits
from hyclora.models.outputs import LateCausalLMOutput
from hyclora.models.stream import Stream
from hyclora.models.trust import why_not_head
from hyclora.operators.cross_entropy import Targets, linear_cross_entropy
from hyclora.operators.linear.lora import Projection
from hyclora.operators.random_state import get_rng_state, replayed_rng
from hyclora.operators.savers import Step


class HeadLinear(Block):
    """In front of the head's linear layer: has its weight read while it is called, as fully_shard may gather it then.

    Its forward is the stock one, or what is to be computed of the hidden states instead.
    """

    def forward(self, hidden: Tensor, compute: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        return self.run_stock(hidden) if compute is None else compute(hidden)


class HeadBlock(Block):
    """LlamaForCausalLM's signature on LinearCrossEntropyFunction: the same loss and gradients, logits when looked at.

    adapted: projections of the decoder. PEFT disables and merges all adapters together, so the first one tells when the
    model as a whole runs stock code. Keeps what linear_cross_entropy does: dh, but no logits; hidden states as long as
    the outputs live.
    """

    # from the first look at logits of a batch in which padded tokens are not as in stock
    logits_read = False

    def __init__(self, module: nn.Module, name: str, step: Step, family: Family, adapted: list[Projection]):
        super().__init__(module, name, {}, step)
        self.family = family
        self.head = projection(module, name, family.head)
        self.linear = HeadLinear(self.head.module, f"{name}.{family.head}", {}, step)
        self.adapted = adapted
        self.projections = [self.head, *adapted[:1]]
        # can_return_tuple reads the default of return_dict off it
        self.config = module.config

    def forward(self, *args, **kwargs):
        """Unlike in a layer's block, autocast stays on: the decoder runs inside."""
        return self.run(*args, **kwargs) if self.applies(*args, **kwargs) else self.run_stock(*args, **kwargs)

    def applies(self, *args, labels=None, logits_to_keep=0, **kwargs) -> bool:
        """Also: HF's default loss of all positions is asked for, and model and head are what they were."""
        self.head.find_adapters()
        return (
            labels is not None
            and len(args) <= 1
            and isinstance(logits_to_keep, int)
            and logits_to_keep == 0
            and "ignore_index" not in kwargs
            and self.module.training
            and torch.is_grad_enabled()
            and self.module._modules.get(self.family.head) is self.head.module
            and getattr(self.head.module, "base_layer", self.head.module) is self.head.base
            and why_not_head(self.family, self.module, self.name) is None
            # not the blocks' answer for this forward: its number is counted when the decoder starts
            and all([p.refresh() for p in self.projections])
        )

    @can_return_tuple
    def run(self, *args, labels, logits_to_keep=0, shift_labels=None, num_items_in_batch=None, **kwargs):
        """The loss (fp32 scalar) of labels or shift_labels [B, S]: their mean, or their sum / num_items_in_batch."""
        targets = Targets(labels, ahead=1) if shift_labels is None else Targets(shift_labels)
        device = self.head.base.weight.device
        # of dropout, and of noise that hooks add
        rng = get_rng_state(device) if kwargs.get("attention_mask") is not None else None
        outputs = self._decode(args, kwargs, unread=None if self.logits_read else targets.miss)
        hidden = outputs.last_hidden_state
        dtype = autocast_dtype(hidden.device.type)
        given = labels if shift_labels is None else shift_labels
        stream, self.step.stream = self.step.stream, None
        shape = hidden.shape[:-1] if stream is None else stream.shape
        if given.numel() != shape.numel():
            raise ValueError(f"labels of shape {list(given.shape)} do not belong to tokens of shape {list(shape)}")
        if stream is not None and not self.step.padding_differs:  # all tokens are real, and in order
            hidden, stream = hidden[:, : stream.length].view(*stream.shape, -1), None
        again = partial(self._decode_again, args, kwargs, rng, stream) if self.step.padding_differs else None
        drawn = get_rng_state(hidden.device) if self.head.dropout else None
        whole, inputs = hidden, [*args, labels, *kwargs.values()]
        if stream is not None and self.head.dropout:  # which is drawn for all tokens, as in the logits
            hidden, stream = stream.scatter(hidden), None
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(device, dtype)
            places = None if stream is None else stream.places
            loss = self.head.module(hidden, partial(self._loss, targets, num_items_in_batch, places))
        # weights that were gathered for the loss may be there from now on
        logits = LateLogits(self, whole, dtype, drawn, again, inputs).defer()
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return LateCausalLMOutput(loss=loss, logits=logits, **others)

    def _loss(self, targets: Targets, num_items, places: Tensor | None, hidden: Tensor) -> Tensor:
        """Where the head's weights are."""
        self.head.refresh()
        return linear_cross_entropy(hidden, targets, self.head, num_items, places)

    def _decode(self, args: tuple, kwargs: dict, unread=None):
        """The decoder's outputs; unread tells it of positions whether nobody reads them."""
        self.step.unread, self.step.in_stream = unread, unread is not None
        try:
            return self.module.base_model(*args, **kwargs)
        finally:
            self.step.unread, self.step.in_stream = None, False

    def _decode_again(
        self, args: tuple, kwargs: dict, rng: Tensor | None, stream: Stream | None, hidden: Tensor
    ) -> Tensor:
        """The hidden states of a forward with padded tokens as in stock, as they are from now on; not another step.

        Real tokens of a stream have those that the forward gave, whose dropout was drawn for another shape.
        """
        self.logits_read = self.step.again = True
        try:
            with nullcontext() if rng is None else replayed_rng(self.head.base.weight.device, rng):
                found = self._decode(args, kwargs).last_hidden_state
            return found if stream is None else stream.scatter(hidden, padding=found)
        finally:
            self.step.again = False
