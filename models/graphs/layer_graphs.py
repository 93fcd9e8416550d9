"""The layers of a training step as CUDA graphs, for kinds of input that come again.

At a few thousand tokens a layer's kernels are shorter than the time the host needs to launch them. So the second time
that a kind of input (shapes, padding, adapters) comes after calibration, the forward of all layers is captured as one
graph and their backward as another; from then on both are replayed. Of streams few sizes are, as they pay (sizes.py).
Inputs are copied to fixed places; activations live in a memory pool that all graphs share; the backward adds to fixed
buffers, which are the parameters' .grad, or are given to autograd where DDP or hooks on parameters wait for them.

Whatever a graph cannot do or would hide runs layer by layer: dropout of attention, hooks on modules, FSDP, gradient
checkpointing by somebody's own function, inputs that differ from layer to layer, a forward before the backward of
another one. Dropout of adapters and of an encoder's hidden states is replayed: a graph draws seeds anew
(operators/linear/dropout.py). Usual gradient checkpointing is recorded like layers that keep their input alone.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Hashable
from contextlib import contextmanager, nullcontext
from copy import copy
from itertools import chain

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_unflatten

from hyclora.models.blocks import autocast_dtype
from hyclora.models.graphs.foresight import Foretold
from hyclora.models.graphs.gradients import GradientBuffers, Listener, ReplayFunction, Ticket, add_gradients, nothing
from hyclora.models.graphs.recording import Recording
from hyclora.models.graphs.sizes import Sizes
from hyclora.models.layers import OURS, WholeLayer
from hyclora.operators.attention.flash import is_bounds
from hyclora.operators.pausable import Pausable
from hyclora.operators.random_state import get_rng_state, replayed_rng

logger = logging.getLogger("hyclora")
# each has graphs and fixed inputs for good; other kinds of input run layer by layer
MAX_RECORDINGS = 12


class LayerGraphs(Pausable):
    """The recordings of one patched model, and when they may run.

    patch: whose Step and Store the layers use; layers: of the decoder, in order.
    While it is paused the layers run one by one.
    """

    def __init__(self, recorder, patch, layers: list[WholeLayer]):
        self.recorder, self.patch, self.step = recorder, patch, patch.step
        self.layers = layers
        inside = [block for layer in layers for block in layer.blocks]
        self.norms = [norm for block in inside for norm in block.norms]
        self.projections = list({id(p): p for block in inside for p in block.projections}.values())
        self.clear()

    def clear(self) -> None:
        """Forget all recordings, and with them the memory that they hold."""
        self.__dict__.update(self._fresh())
        self.recorder = copy(self.recorder)  # a pool without graphs cannot be used again

    def __getstate__(self) -> dict:
        """A copy of a model records for itself."""
        return self.__dict__ | self._fresh()

    @staticmethod
    def _fresh() -> dict:
        return {
            "recordings": {},
            "_seen": Counter(),
            "_refused": set(),
            "gradients": GradientBuffers(),
            "_store": None,
            "_pending": nothing,
            "_arguments": [],
            **dict.fromkeys(("_kind", "_latest", "_asked", "_started", "_first", "_warm")),
            "_passing": False,
            "sizes": Sizes(),
            "_listener": Listener.NOBODY,
        }

    def fill(self, n_tokens: int, n_documents: int) -> tuple[int, int]:
        """The tokens and documents of a stream that a recording serves, or will, with one more document for filler."""
        sizes = self.sizes
        if sizes.make_places(n_documents + 1) and self.recordings:
            self.clear()
            self.sizes = sizes
        return sizes.choose(n_tokens, self.step.calibrating, len(self.recordings) < MAX_RECORDINGS), sizes.places

    @property
    def able(self) -> bool:
        """Whether the layers can be replayed as they are, as far as it shows before they are called."""
        whole = self.active and self.patch.watch.whole and not (self.patch.watch.drops or self.patch.watch.is_hooked())
        return whole and all(layer.can_be_recorded for layer in self.layers)

    def foresee(self, asked: Foretold | None, decoder: nn.Module, ids: Tensor | None) -> None:
        """Start the forward of token ids before Hugging Face's code comes to the first layer: the GPU waits for it.

        asked: what foretell() says, to be compared with that of steps before. At worst the work is in vain, as replay()
        makes sure of the rest.
        """
        self._asked, self._started = asked, None
        if asked is None or not self._possible():
            return
        given = next((kind[0] for kind, recording in self.recordings.items() if recording.asked == asked), None)
        recording = self._likely(given)
        if recording is not None and recording.asked == asked and recording.start_from(decoder, ids, asked):
            self._started = recording

    def forget_start(self) -> None:
        """What was started for a forward that did not come to its first layer is nobody's."""
        self._asked = self._started = None

    def replay(self, layer: WholeLayer, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor | None:
        """What a layer returns if all layers are replayed as one; None if it has to run by itself."""
        if layer is not self.layers[0]:
            if self._passing:
                self._passing = layer is not self.layers[-1]
                if not self._passing:
                    self._kind, self._arguments = None, []
                return hidden
            self._compare(args, kwargs)
            return None
        self._passing, self._kind, self._arguments = False, None, []
        asked, self._asked = self._asked, None
        recording, inputs, weights = self._find(hidden, args, kwargs)
        started, self._started = self._started, None
        if recording is not started:
            if started is not None:
                started.rewind()
            if recording is not None:
                recording.start(inputs)
        if recording is None:
            return None
        self._latest, recording.asked = (self._kind[1], weights), asked
        self._passing = len(self.layers) > 1
        reached = (recording.anchor,) if self._listener is Listener.NOBODY else recording.gradients
        return ReplayFunction.apply(hidden, recording, self.begin(weights), self.gradients, self._listener, *reached)

    def _find(self, hidden: Tensor, args: tuple, kwargs: dict) -> tuple[Recording | None, list[Tensor], list[Tensor]]:
        """The recording to replay, if there is one, its inputs, and the weights that it reads; started if it can be."""
        if not self._possible() or hidden.device != self.recorder.device:
            return None, [], []
        self._arguments, spec = tree_flatten((args, kwargs))
        inputs = [hidden, *(t for t in self._arguments if _varies(t, hidden))]
        if any(t.requires_grad for t in inputs[1:]):
            return None, [], []
        given = self._given(hidden, self._arguments, spec)
        if not all(isinstance(value, Hashable) for value in given):  # an argument of somebody's
            return None, [], []
        # PEFT's state takes a while to read: if the rest is known the GPU starts meanwhile, at worst in vain
        likely = self._likely(given)
        if likely is not None and likely is not self._started:
            self._start(likely, inputs)
        self._latest = None
        weights = self._weights()
        if weights is None:
            return None, [], []
        self._kind = given, self._state_of(weights)
        if self._kind in self._refused:
            return None, [], []
        recording = self.recordings.get(self._kind) or self._record(hidden, self._arguments, spec)
        return recording, inputs, weights

    def _start(self, recording: Recording, inputs: list[Tensor]) -> None:
        if self._started is not None:
            self._started.rewind()
        self._started = recording
        recording.start(inputs)

    def begin(self, weights: list[Tensor]) -> Ticket:
        """A forward of these weights has been replayed: its activations are in the pool as long as the ticket lives."""
        ticket = Ticket(weights, [p.module for p in self.projections if p.has_adapter])
        self._pending = weakref.ref(ticket)
        return ticket

    def _possible(self) -> bool:
        """Whether a replay could start now: nothing is in its memory, savers do not change, and attention is ours.

        And Hugging Face's decoder calls the layers, so that all of them follow the first.
        """
        able = self.active and self.step.private and self.patch.watch.whole and torch.is_grad_enabled()
        able = able and self.step.known_angles and not (self.step.calibrating or self.step.stock_attention)
        # somebody who packs what autograd saves, as save_on_cpu does, would get nothing, or all of it in a capture
        able = able and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        return able and self._pending() is None

    def _given(self, hidden: Tensor, leaves: list, spec) -> tuple:
        """What the inputs of two steps must have in common to be replayed alike."""
        return (
            spec,
            autocast_dtype(hidden.device.type),
            *((t.shape, t.dtype, t.requires_grad) if _varies(t, hidden) else _value(t) for t in (hidden, *leaves)),
        )

    def _likely(self, given: tuple) -> Recording | None:
        """The recording of such inputs, if what it reads is where it was.

        The tensors are those of last time: as they are held here, nothing that a replay reads has been freed, even if
        the modules have other ones by now.
        """
        if self._latest is None:
            return None
        state, weights = self._latest
        return self.recordings.get((given, state)) if state[0] == _places(weights) else None

    def _weights(self) -> list[Tensor] | None:
        """What a replay reads of the blocks' modules; None if these are in a state that is not to be replayed."""
        if not all(layer.can_be_recorded and layer.module.training for layer in self.layers):
            return None
        if self.patch.watch.drops or self.patch.watch.is_hooked():
            return None
        running = self.step.running
        if not all([p.refresh(running) for p in self.projections]):
            return None
        trainable = [t for p in self.projections for t in p.parameters() if t is not None]
        trainable += [t for norm in self.norms for t in norm.parameters(recurse=False)]
        if not any(t.requires_grad for t in trainable):
            return None
        self._listener = Listener.of(trainable)
        return [p.base.weight for p in self.projections] + trainable

    def _state_of(self, weights: list[Tensor]) -> tuple:
        """What a recording is found by beside its inputs: which weights there are, where, and the adapters' state."""
        trained = tuple(id(t) if t.requires_grad else 0 for t in weights)
        adapters = ((p.adapter, p.scaling, p.dropout) for p in self.projections)
        layers = ((layer.checkpointed, layer.dropout()) for layer in self.layers)
        return _places(weights), trained, self.patch.watch.numbers, *adapters, *layers

    def _compare(self, args: tuple, kwargs: dict) -> None:
        """A later layer runs by itself: unless its arguments are those of the first one, this kind stays so."""
        leaves = tree_flatten((args, kwargs))[0]
        if len(leaves) != len(self._arguments) or any(a is not b for a, b in zip(leaves, self._arguments, strict=True)):
            self._refused.add(self._kind)

    def _record(self, hidden: Tensor, leaves: list, spec) -> Recording | None:
        """Record a kind of input that came before, or a size of rows; None while it should still run layer by layer."""
        seen, state = hash(self._kind), self._kind[1]  # a kind is long, and with padding to the longest row many come
        self._seen[seen] += 1
        # in each state layers run by themselves first, which calibrates slots that were not kept before
        chosen, self._warm = self._warm == state and self.step.stream is not None, state
        if self._seen[seen] == 1 and not chosen or not self._make_room():
            return None
        eager = self.patch.store
        if eager is not None and self._store is None:
            if not eager.empty:
                return None
            # graphs copy to fixed host bytes, so the store that has them is theirs from now on
            self._store, eager = eager, copy(eager)
        cache = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        self.patch.use(self._store)
        self.step.recording = True
        self.recorder.trim()
        try:
            # the first replay draws what the layers by themselves would have
            with replayed_rng(hidden.device, get_rng_state(hidden.device)):
                self.recordings[self._kind] = self._capture(hidden, leaves, spec)
            if self.step.stream is not None:
                self.sizes.record(self.step.stream.size)
        except torch.OutOfMemoryError:
            if self.patch.config.cuda_graphs is True:
                raise
            logger.warning(
                "HyC-LoRA: there is not enough GPU memory to record CUDA graphs, which need some of their own: the "
                "layers run one by one from now on. cuda_graphs=False does not try; shorter or fewer rows leave room"
            )
            self.clear()
            self.active = False
            return None
        finally:
            self.recorder.trim()
            self.patch.use(eager)
            self.step.recording = False
            torch.set_autocast_cache_enabled(cache)
        return self.recordings[self._kind]

    def _make_room(self) -> bool:
        """Whether one more can be recorded, those of another state of the adapters forgotten if need be."""
        if len(self.recordings) == MAX_RECORDINGS:
            state = self._kind[1]
            self.recordings = {kind: recording for kind, recording in self.recordings.items() if kind[1] == state}
            self.sizes.recorded &= {recording.inputs[0].shape[1] for recording in self.recordings.values()}
            self.recorder = self.recorder if self.recordings else copy(self.recorder)  # as in clear()
        return len(self.recordings) < MAX_RECORDINGS

    def _capture(self, hidden: Tensor, leaves: list, spec) -> Recording:
        first = self._fixed(hidden).requires_grad_(hidden.requires_grad)
        setattr(first, OURS, True)
        leaves = [t.detach().clone() if _varies(t, hidden) else t for t in leaves]
        args, kwargs = tree_unflatten(leaves, spec)
        trained = [_trained(layer.module) for layer in self.layers]
        anchor = next(p for layer in trained for _, _, p in layer)
        adopt = self._listener is not Listener.PARTS
        buffers = {p: self.gradients.of(p, adopt) for layer in trained for _, _, p in layer}
        reached: dict[nn.Parameter, Tensor] = {}
        # edges, not tensors: between two layers nothing but the sum of both is kept, and not for backward
        edges: list[tuple[GradientEdge | None, list[Tensor]]] = []

        def forward() -> Tensor:
            edges.clear()
            x, edge = first, get_gradient_edge(first) if first.requires_grad else None
            aliases = [[nn.Parameter(parameter.detach()) for _, _, parameter in layer] for layer in trained]
            with self._aliased(trained, aliases):
                for layer, parameters in zip(self.layers, aliases, strict=True):
                    with self._held(layer):
                        x = layer.run_layer(x, *args, **kwargs)
                    edges.append((edge, parameters))
                    edge = get_gradient_edge(x) if x.requires_grad else None
            edges.append((edge, []))
            self._settle()
            return x.detach()

        def backward() -> Tensor | None:
            dx, (edge, _) = dy, edges.pop()
            for layer, places in zip(reversed(self.layers), reversed(trained), strict=True):
                below, parameters = edges.pop()
                if edge is None:  # nothing is trained from here on
                    break
                inputs = [*parameters, *([] if below is None else [below])]
                with self._aliased([places], [parameters]) if layer.keeps_input else nullcontext():
                    found = list(torch.autograd.grad(edge, inputs, dx, allow_unused=True))
                dx, edge = None if below is None else found.pop(), below
                pairs = [(p, g) for (_, _, p), g in zip(places, found, strict=True) if g is not None]
                reached.update((p, buffers[p]) for p, _ in pairs)
                add_gradients([(buffers[p], g) for p, g in pairs])
            self._settle()
            return dx

        output, replay_forward = self.recorder.record(forward)
        # whoever reads the output has done so by then; autograd would tell if not
        dy = output.detach()
        # in this thread: another one would bring GEMM workspaces of its own
        with torch.autograd.set_multithreading_enabled(False):
            dx, replay_backward = self.recorder.record(backward)
        paths = tree_flatten_with_path((args, kwargs))[0]
        varying = [(path, t) for path, t in paths if _varies(t, hidden)]
        inputs, places = [first, *(t for _, t in varying)], [path for path, _ in varying]
        draws = any(p.dropout for p in self.projections) or any(any(m.dropout()) for m in self.layers)
        replays = replay_forward, replay_backward
        return Recording(anchor, inputs, places, output, dy, dx, reached, *replays, self._store, draws)

    def _fixed(self, hidden: Tensor) -> Tensor:
        """The place of a recording's input, in that of a larger one if there is one: no two are in use at a time."""
        n, large = hidden.numel(), self._first
        if large is None or large.dtype != hidden.dtype or large.numel() < n:
            # embeddings that nobody else looks at take the place themselves: a copy would live beside them till the end
            own = self.step.embeds and hidden.is_contiguous()
            large = self._first = hidden.detach() if own else hidden.new_empty(n)
        return large.view(-1)[:n].view(hidden.shape)

    @contextmanager
    def _aliased(self, trained: list[list[tuple[nn.Module, str, nn.Parameter]]], aliases: list[list[nn.Parameter]]):
        """Other parameters of the same memory in the place of these, layer by layer.

        Autograd ties a parameter to the stream on which a graph that is still alive first used it. Usually that is the
        default stream, on which a capture must not depend.
        """
        self._put(trained, aliases)
        try:
            yield
        finally:
            self._put(trained, [[parameter for _, _, parameter in layer] for layer in trained])

    def _put(self, trained, parameters: list[list[nn.Parameter]]) -> None:
        for (owner, name, _), parameter in zip(chain(*trained), chain(*parameters), strict=True):
            owner._parameters[name] = parameter
        for p in self.projections:
            p.refresh()

    def _held(self, layer: WholeLayer):
        """A graph ends when its copies do: those of the last layer would be waited for, only to be fetched again."""
        return nullcontext() if self._store is None or layer is not self.layers[-1] else self._store.holding()

    def _settle(self) -> None:
        if self._store is not None:
            self._store.settle()


def _varies(leaf, hidden: Tensor) -> bool:
    """Whether an argument is data that kernels read; what the host reads is part of what is recorded."""
    return isinstance(leaf, Tensor) and leaf.device == hidden.device and not is_bounds(leaf)


def _places(tensors: list[Tensor]) -> tuple[int, ...]:
    """Where in memory tensors are."""
    return tuple(map(Tensor.data_ptr, tensors))


def _value(leaf):
    return (leaf.shape, *leaf.flatten().tolist()) if isinstance(leaf, Tensor) else leaf


def _trained(module: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """The parameters that get a gradient, with the modules and names that they have them under."""
    named = [(m, name, p) for m in module.modules() for name, p in m._parameters.items()]
    return [(m, name, p) for m, name, p in named if p is not None and p.requires_grad]
