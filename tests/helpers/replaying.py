"""Models whose layers are replayed, and stand-ins for CUDA graphs on a CPU."""

from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hyclora import HycloraConfig, apply_hyclora
from hyclora.models.graphs.recording import CudaRecorder
from hyclora.models.patch import find_patch
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.offloading import offloaded
from tests.helpers.small_models import llama, padded_batch

CALIBRATION = 2


class Recorder:
    """Records by running, and undoes what that did to gradients and to the input; run() must not look at values."""

    def __init__(self):
        self.graphs, self.device = None, torch.device("cpu")

    def trim(self):
        pass

    def record(self, run):
        kept = [(buffer, buffer.clone()) for buffer in self.graphs.gradients._buffers.values()]
        first = self.graphs.layers[0]

        def run_layer(x, *args, **kwargs):
            kept.append((x.data, x.detach().clone()))  # an encoder saves it, and autograd would see another version
            return type(first).run_layer(first, x, *args, **kwargs)

        first.run_layer = run_layer
        result, replay = self.replayable(run)
        del first.run_layer
        for buffer, value in kept:
            buffer.copy_(value)
        return result, replay


class Rerun(Recorder):
    """A replay runs again into the same output: for stores, whose late copies are no operations of torch."""

    def replayable(self, run):
        step, before = self.graphs.step, torch.get_rng_state()
        result, draws = run(), not torch.equal(before, torch.get_rng_state())

        def replay():
            step.recording, before = True, torch.get_rng_state()  # what is done is what was recorded
            try:
                with torch.enable_grad():  # which is off where autograd calls a Function
                    again = run()
            finally:
                step.recording = False
            if not draws:  # as a graph, whatever dropout is set by now: it is another recording's
                torch.set_rng_state(before)
            if result is not None:
                result.copy_(again)

        return result, replay


class SameMemory(Recorder):
    """A replay does the recorded operations again, on the same memory, as a CUDA graph does."""

    @staticmethod
    def replayable(run):
        with Operations() as operations:
            result = run()
        return result, torch.no_grad()(operations.repeat)


class Operations(TorchDispatchMode):
    """What torch is asked for inside, to be repeated on the same tensors."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = function(*args, **kwargs)
        given = {memory(t) for t in tensors((args, kwargs))}
        self.done.append((function, args, kwargs, [t if memory(t) not in given else None for t in tensors(found)]))
        return found

    def repeat(self) -> None:
        for function, args, kwargs, results in self.done:
            for result, again in zip(results, tensors(function(*args, **kwargs)), strict=True):
                if result is not None:
                    result.detach().copy_(again.detach())


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def memory(t: torch.Tensor) -> int:
    return t.untyped_storage().data_ptr()


def config(**options) -> HycloraConfig:
    return HycloraConfig(iteration_threshold=CALIBRATION, **options)


def graphed(model, options: dict, offload: bool = False, recorder=None):
    """The graphs of a model that this patches, recorded by a stand-in on a CPU."""
    if offload:
        offloaded(model, config(**options))
    else:
        apply_hyclora(model, config(**options))
    stand_in = recorder or (Rerun if offload else SameMemory)()
    recorder = CudaRecorder(next(model.parameters()).device) if DEVICE == "cuda" else stand_in
    patch = find_patch(model)
    patch.add_graphs(recorder)
    patch.graphs.recorder.graphs = patch.graphs
    return patch.graphs


def batches(n: int) -> list[dict]:
    """Unpadded batches of one shape."""
    found = []
    for seed in range(n):
        batch = padded_batch(rows=2, width=16, seed=seed)
        batch["attention_mask"].fill_(1)
        found.append(batch | {"labels": batch["input_ids"]})
    return found


def train(model, steps: list[dict], zero_every: int = 1, set_to_none: bool = True) -> list[dict]:
    """Losses and gradients after each batch; gradients accumulate over zero_every of them."""
    found = []
    for i, batch in enumerate(steps):
        if i % zero_every == 0:
            model.zero_grad(set_to_none=set_to_none)
        loss = model(**batch).loss
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach().clone()} | grads)
    return found


def replayed(model, graphs, batch) -> bool:
    """Whether a forward and backward of batch replays."""
    output = model(**batch).loss
    replays = graphs._pending() is not None
    output.backward()
    return replays


def starts(graphs) -> list[str]:
    """A list that a word is added to whenever the only recording's forward is started."""
    (recording,) = graphs.recordings.values()
    started, forward = [], recording.forward
    recording.forward = lambda: (started.append("start"), forward())
    return started


def record(family=llama):
    """A model whose layers are replayed for a batch, its graphs, and the batch."""
    model, (*first, batch) = family(), batches(CALIBRATION + 3)
    graphs = graphed(model, {})
    train(model, first)
    assert replayed(model, graphs, batch)
    return model, graphs, batch


def nothing_around():
    """What torch's checkpointing is to have around both runs, of somebody's own: such is not recorded."""
    return nullcontext(), nullcontext()
