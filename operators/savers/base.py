"""What a saver is, and the keeper that carries a block's packed slots from its forward to its backward."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from hyclora.operators.random_state import Draws
from hyclora.operators.store.store import Home, Store, redeem, ticket

# bytes of a block's x A^T above which they are worth copies of their own, which take some microseconds each
LARGE = 2**19
# on a forward's cos: whether attentions run stock code, and what is known of its values
STOCK, ROTATES = "_hyclora_stock", "_hyclora_rotates"


@dataclass
class Step:
    """Where training is; one object a patched model, shared by all its blocks.

    index counts training forwards of the model (a recomputation by gradient checkpointing is not one), token_mask is
    the batch's [B, S] mask of real tokens or None. running: index while the decoder runs, None outside, where somebody
    calls a layer by itself or checkpointing runs it again; private: nobody but the layers sees what goes from one to
    the next, and Hugging Face's decoder calls them in order; embeds: nor what goes into the first. Calibration lasts
    while index <= threshold (which models/calibration.py moves). since: statistics of forwards before that one are
    replaced, not added to; informative: this forward says something that those since then did not.
    stream: the row that the decoder computes in place of the batch (models/stream.py), and gives where in_stream says
    that its caller knows.
    unread: of whoever calls the decoder and knows what it will read, tells of positions (bool [B, S] on the host)
    whether nobody reads them; padding_differs: so padded tokens of this forward got other hidden states than in stock;
    again: it is the second forward of a batch, for those. stock_attention: its attentions run stock code;
    known_angles: cos and sin are as Hugging Face's code makes them. restored: of the last layer's input, for the next
    one to keep its difference to that (difference.py).
    passing: a layer runs that backward will run again, so its blocks run without a graph and nothing of theirs stays;
    holds_input: a layer's input is not to be written to; draws: of a layer that is run twice, where random state cannot
    be put back; whole: that layer's module, where it is all that runs (operators/checkpoint.py). recording: work is
    recorded, not done. patched: the patch is on the model. once: within what PEFT's switches are read but once, None if
    each time: a forward of the decoder, or the second run of a layer.
    """

    threshold: int
    index: int = 0
    running: int | None = None
    private: bool = False
    embeds: bool = False
    token_mask: Tensor | None = field(default=None, repr=False)
    since: int = 1
    informative: bool = True
    unread: Callable[[Tensor], bool] | None = field(default=None, repr=False)
    padding_differs: bool = False
    again: bool = False
    stream: object = field(default=None, repr=False)
    in_stream: bool = False
    stock_attention: bool = False
    known_angles: bool = False
    restored: object | None = field(default=None, repr=False)
    passing: bool = False
    holds_input: bool = False
    draws: Draws | None = field(default=None, repr=False)
    whole: object | None = field(default=None, repr=False)
    recording: bool = False
    patched: bool = True
    _again: object | None = field(default=None, repr=False)

    @property
    def calibrating(self) -> bool:
        return self.index <= self.threshold

    @property
    def trains(self) -> bool:
        """Whether what runs now belongs to a forward that a backward comes to."""
        return torch.is_grad_enabled() or self.passing

    @property
    def once(self) -> object | None:
        return self._again if self.running is None else self.running

    @property
    def runs_again(self) -> bool:
        """Whether a layer runs for the second time: what it keeps is for one backward, which comes at once."""
        return self._again is not None

    @contextmanager
    def layer(self, *, passing: bool, holds_input: bool, draws: Draws | None, whole: object | None):
        """One of the two runs of a layer, the first if passing."""
        before = self.passing, self.holds_input, self.draws, self.whole, self._again
        self.passing, self.holds_input, self.draws, self.whole = passing, holds_input, draws, whole
        self._again = None if passing else object()
        try:
            yield
        finally:
            self.passing, self.holds_input, self.draws, self.whole, self._again = before

    def is_stock_attention(self, angles: tuple[Tensor, Tensor] | None) -> bool:
        """stock_attention of the forward that has these cos and sin; checkpointing runs it again after other ones."""
        if not angles:
            return self.stock_attention
        if self.running is not None and self.stock_attention:
            setattr(angles[0], STOCK, True)
        return getattr(angles[0], STOCK, False) if self.running is None else self.stock_attention

    def rotates(self, angles: tuple[Tensor, Tensor] | None) -> bool:
        """Whether cos and sin turn pairs of numbers, so that their first halves say all; looked at if nobody knows."""
        if not angles:
            return True
        if self.running is not None and self.known_angles:
            setattr(angles[0], ROTATES, True)
            return True
        known = getattr(angles[0], ROTATES, None)
        if known is None:
            halves = (t.chunk(2, dim=-1) for t in angles)
            known = all(torch.equal(first, second) for first, second in halves)
            setattr(angles[0], ROTATES, known)
        return known

    def mask(self, n_rows: int) -> Tensor | None:
        """Which of n_rows tokens are real, bool [T]; None if the batch does not say so of as many."""
        if self.token_mask is None or self.token_mask.numel() != n_rows:
            return None
        return self.token_mask.reshape(-1).bool()


def taken_off(name: str) -> ValueError:
    """What is to be said where a backward runs again what a patch ran that has been removed since."""
    return ValueError(
        f"{name}: the patch was taken off between a forward and its backward, which runs this layer again; run the "
        "backward first"
    )


class Saver:
    """How one slot is kept; this class by itself keeps nothing, 0 bytes a token."""

    stored = False

    def __str__(self) -> str:
        return type(self).__name__.lower()

    def due(self, step: Step) -> bool:
        """Whether the slot is to be calibrated in this forward, and has not been yet."""
        return False

    def state_dict(self) -> dict[str, Tensor]:
        """Calibrated tensors, by name; empty for a saver without calibration."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} keeps no calibration state, but {sorted(state)} were given")


class Recompute(Saver):
    """Nothing is kept, 0 bytes a token: the block computes the slot again from other slots."""


class Derived(Saver):
    """Nothing is kept, 0 bytes a token: the slot is x_hat * w (+ b) of a norm that keeps x_hat (Keeper.derive).

    own: keeps the slot where it is not that norm's output, as in a layer that checkpointing runs again by itself; None
    where a block then runs stock code.
    """

    def __init__(self, own: "StoringSaver | None" = None):
        self.own = own

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.own is None else self.own.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        (super() if self.own is None else self.own).load_state_dict(state)


class StoringSaver(Saver, ABC):
    """Keeps a slot as packed tensors between forward and backward: bits(C) / 8 bytes a token of C channels.

    n_state: how many of the packed tensors, at their end, are not the slot's but the saver's, the same in every step.
    """

    stored = True
    aliases = False  # whether what is kept is the tensor itself, which must then not be written to
    n_state = 0

    @abstractmethod
    def pack(self, x: Tensor, step: Step) -> tuple[Tensor, ...]:
        """What autograd keeps of x."""

    @abstractmethod
    def unpack(
        self, packed: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype, weight: Tensor | None = None
    ) -> Tensor:
        """x as backward sees it, in dtype; times weight [C] if given."""

    def bits(self, n_cols: int) -> float:
        """Bits kept for one token of n_cols elements, those kept as they are being of 16 bits; 16 n_cols by itself."""
        return 16.0 * n_cols


@dataclass(frozen=True)
class Source:
    """Rides on a norm's output: where its x_hat is packed, so that a block fed by it need not keep its input.

    Without a weight it is any slot that another block shares (difference.py). homes: where each packed tensor is if a
    store has it (it is None then in packed).
    """

    packed: tuple[Tensor | None, ...]
    homes: tuple[Home | None, ...]
    saver: Saver
    shape: torch.Size
    dtype: torch.dtype
    weight: Tensor | None = None
    bias: Tensor | None = None


class Keeper:
    """The packed slots of one block between forward and backward.

    Everything goes through ctx.save_for_backward, so that saved-tensor hooks (offloading, checkpointing, counting)
    see it; restore() drops its references, so that a slot is freed as soon as it is used. With a store, the packed
    tensors of slots go there (as a unit of that span), with x A^T where that is LARGE, and what autograd saves
    instead is a ticket for them, 0 bytes.
    Keeps what its savers do; keep_exact and derive keep a reference. Allocates what a saver packs or restores.
    """

    def __init__(self, savers: dict[str, Saver], step: Step | None, store: Store | None = None, span: int = 1):
        self.savers, self.step, self.store, self.span = savers, step, store, span
        self._tensors: list[Tensor | None] = []
        self._layout: dict[str, tuple] = {}
        self._parts: dict[int, dict[str, tuple]] = {}
        self._slots: list[int] = []
        self._rows: list[int] = []
        self._homes: dict[int, Home] = {}

    def part(self, index: int) -> "Keeper":
        """The keeper of one tile of tokens: names of its own, tensors that are saved and loaded with all others."""
        part = copy(self)
        part._layout = self._parts.setdefault(index, {})
        return part

    def drawn(self, draw: Callable[[torch.device], Tensor], device: torch.device) -> Tensor:
        """draw(device), or what it gave when this layer ran first."""
        draws = None if self.step is None else self.step.draws
        return draw(device) if draws is None else draws.next(partial(draw, device))

    def keeps(self, name: str) -> bool:
        return self.savers[name].stored

    def aliases(self, *names: str) -> bool:
        """Whether one of these slots is kept as the tensor itself."""
        return any(self.savers[name].stored and self.savers[name].aliases for name in names)

    def keep(self, name: str, x: Tensor) -> None:
        """Pack slot x by its saver; a slot that is not stored is left out."""
        saver = self._storing(name)
        if saver.stored:
            self.adopt(name, saver.pack(x, self.step), x.shape, x.dtype)

    def _storing(self, name: str) -> Saver:
        """The saver that keeps a slot when it is not derived."""
        saver = self.savers[name]
        return saver.own if isinstance(saver, Derived) and saver.own is not None else saver

    def adopt(self, name: str, packed: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> None:
        """Keep a slot that a fused kernel has packed already, in the layout of its saver.

        Nothing in the first of two runs, which no backward comes to: an MLP would have those of all tiles at its end.
        """
        saver, first = self._storing(name), len(self._tensors)
        if self.step is not None and self.step.passing:
            packed = (None,) * len(packed)
        slot = packed[: len(packed) - saver.n_state]
        self._slots += [first + i for i, t in enumerate(slot) if t is not None and t.numel()]
        self._add(name, packed, shape, dtype, saver)

    def keep_exact(self, name: str, x: Tensor | None) -> None:
        """Keep a small tensor (rstd, a parameter, a seed) or an input as it is."""
        if x is not None:
            self._add(name, (x,), x.shape, x.dtype, None)

    def keep_rows(self, name: str, x: Tensor) -> None:
        """Keep x A^T, rows of a few numbers, as they are; a store gets them too if they are LARGE together."""
        self._rows.append(len(self._tensors))
        self.keep_exact(name, x)

    def derive(self, name: str, source: Source) -> None:
        """Keep slot = x_hat * w (+ b) by sharing the norm's packed x_hat; w, b are read again at backward time."""
        first = len(self._tensors)
        self._homes |= {first + i: home for i, home in enumerate(source.homes) if home is not None}
        scale = source.weight, source.bias
        self._add(name, source.packed, source.shape, source.dtype, source.saver, scale)

    def source(self, name: str, weight: Tensor | None = None, bias: Tensor | None = None) -> Source:
        """A handle by which another block has the slot saved here, times w (+ b) if given: its input, of an x_hat."""
        first, count, shape, dtype, saver, _ = self._layout[name]
        homes = tuple(self._homes.get(first + i) for i in range(count))
        return Source(tuple(self._tensors[first : first + count]), homes, saver, shape, dtype, weight, bias)

    def _add(self, name, tensors, shape, dtype, saver, scale=(None, None)) -> None:
        self._layout[name] = (len(self._tensors), len(tensors), shape, dtype, saver, scale)
        self._tensors.extend(tensors)

    def save(self, ctx) -> None:
        """Hand all kept tensors to autograd, those of slots by way of the store if there is one."""
        if self.store is not None:
            rows = self._rows if sum(self._tensors[i].nbytes for i in self._rows) > LARGE else []
            slots, large = ([self._tensors[i] for i in positions] for positions in (self._slots, rows))
            homes = self.store.put(slots, self.span, large)
            self._homes |= dict(zip(self._slots + rows, homes, strict=True))
        for i in self._homes:
            self._tensors[i] = None
        ctx.save_for_backward(*self._tensors, *([ticket(self._homes)] if self._homes else []))
        ctx.slot_layout, ctx.slot_parts, ctx.has_ticket = self._layout, self._parts, bool(self._homes)
        ctx.kept_in = self.step

    @classmethod
    def load(cls, ctx) -> "Keeper":
        """The slots that forward saved on ctx; ValueError if torch's checkpointing can make them no more."""
        keeper = cls({}, None)
        try:
            keeper._layout, keeper._tensors = dict(ctx.slot_layout), list(ctx.saved_tensors)
        except RuntimeError as error:
            if ctx.kept_in is None or ctx.kept_in.patched:
                raise
            raise taken_off("gradient checkpointing") from error
        keeper._parts = {index: dict(layout) for index, layout in ctx.slot_parts.items()}
        # or autograd holds them until the block's backward is over; not if the graph is retained
        ctx.maybe_clear_saved_tensors()
        if ctx.has_ticket:
            for i, tensor in redeem(keeper._tensors.pop()).items():
                keeper._tensors[i] = tensor
        return keeper

    def saver(self, name: str) -> Saver:
        """The saver that packed a kept slot."""
        return self._layout[name][4]

    def take(self, name: str) -> tuple[Tensor, ...]:
        """The packed tensors of a slot, once, for a fused kernel that unpacks them itself."""
        first, count, *_ = self._layout[name]
        packed = tuple(self._tensors[first : first + count])
        self._tensors[first : first + count] = [None] * count
        return packed

    def restore(self, name: str, dtype: torch.dtype | None = None) -> Tensor | None:
        """The slot as backward sees it, once, in its own dtype or the given one; None if it was not kept."""
        if name not in self._layout:
            return None
        packed = self.take(name)
        _, _, shape, kept_dtype, saver, scale = self._layout.pop(name)
        return _unpack(saver, packed, shape, dtype or kept_dtype, *scale)

    def restore_rows(self, name: str, rows: slice, dtype: torch.dtype) -> Tensor | None:
        """These rows of a slot [T, C] in dtype, which stays kept; None if it was not kept."""
        if name not in self._layout:
            return None
        first, count, shape, _, saver, scale = self._layout[name]
        if saver is None:
            return self._tensors[first][rows].to(dtype)
        state = first + count - saver.n_state
        packed = *(t[rows] for t in self._tensors[first:state]), *self._tensors[state : first + count]
        return _unpack(saver, packed, torch.Size((rows.stop - rows.start, *shape[1:])), dtype, *scale)

    def exact(self, name: str) -> Tensor | None:
        """A tensor given to keep_exact, as often as needed; None if it was not kept."""
        return self._tensors[self._layout[name][0]] if name in self._layout else None


def _unpack(saver: StoringSaver, packed, shape, dtype, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """A slot, times weight and plus bias where it is a norm's output; with a weight it is a tensor of its own."""
    x = saver.unpack(packed, shape, dtype, weight)
    return x if bias is None else x.add_(bias)
