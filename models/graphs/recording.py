"""Recorded work: what makes CUDA graphs of it, and the two graphs of one kind of input."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import key_get

from hyclora.models.graphs.foresight import Foretold
from hyclora.operators.random_state import get_rng_state, set_rng_state


def free_workspaces() -> None:
    """Give back the memory that cuBLAS works in until the next GEMM: each thread and stream has 32 MiB on a Hopper GPU.

    Autograd's thread has its own, so one of the two always lies unused. Torch does so around graphs of its own
    (torch/_inductor/cudagraph_trees.py).
    """
    torch._C._cuda_clearCublasWorkspaces()


class CudaRecorder:
    """Captures work as CUDA graphs that share a memory pool, as no two of them run at the same time."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __reduce__(self):
        return CudaRecorder, (self.device,)

    def __copy__(self) -> "CudaRecorder":
        """Another pool; the same stream, as torch has few, and GEMM workspaces for each that was used."""
        twin = object.__new__(CudaRecorder)
        twin.device, twin.stream, twin.pool = self.device, self.stream, torch.cuda.graph_pool_handle()
        return twin

    def trim(self) -> None:
        """Give GEMM workspaces back: before a recording, as its memory is the peak, and after it.

        That of a recording is memory of the pool, which replays write to as to all of it, one at a time.
        """
        free_workspaces()

    def record(self, run: Callable) -> tuple:
        """What run() returns, and a function that does its work; the work is not done yet."""
        graph = torch.cuda.CUDAGraph()
        # relaxed: a store may have to pin host memory meanwhile
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="relaxed"):
            result = run()
        return result, graph.replay


@dataclass
class Recording:
    """One kind of input: its fixed tensors and its two graphs.

    anchor: one of the parameters that get a gradient; inputs: what varies of the first layer's arguments, and where in
    them that is, for all but the first one; output: of the last layer; dy: its gradient, in the same memory; dx: that
    of the first layer's input, None if not needed; gradients: the parameters that get one, with the buffers that the
    backward adds it to; store: whose host memory the graphs copy to; draws: whether the forward draws random numbers;
    asked: what decided the inputs that it has now, if that is known.
    """

    anchor: nn.Parameter
    inputs: list[Tensor]
    places: list[tuple]
    output: Tensor
    dy: Tensor
    dx: Tensor | None
    gradients: dict[nn.Parameter, Tensor]
    forward: Callable[[], None]
    backward: Callable[[], None]
    store: object = None
    draws: bool = False
    before: Tensor | None = None  # the generator's state before the forward that was queued last
    asked: Foretold | None = None

    @torch.no_grad()
    def start(self, inputs: list[Tensor]) -> None:
        """Queue the forward of these inputs."""
        self.asked = None
        torch._foreach_copy_(self.inputs, inputs)
        self._run()

    @torch.no_grad()
    def start_from(self, decoder: nn.Module, ids: Tensor, asked: Foretold) -> bool:
        """Queue the forward of these tokens, other inputs as they are unless they are foretold.

        Whether that can be: they are of the recorded kind.
        """
        embeddings, (first, *others) = decoder.get_input_embeddings().weight, self.inputs
        if (embeddings.dtype, embeddings.device) != (first.dtype, first.device) or ids.device != first.device:
            return False
        if asked.row is not None:
            found = (None, asked.arguments(decoder, first))
            try:
                given = [key_get(found, place) for place in self.places]
            except KeyError:
                return False
            if any((a.shape, a.dtype) != (b.shape, b.dtype) for a, b in zip(given, others, strict=True)):
                return False
            torch._foreach_copy_(others, given)
        torch.index_select(embeddings, 0, ids.flatten(), out=first.view(ids.numel(), -1))
        self._run()
        return True

    def _run(self) -> None:
        self.before = get_rng_state(self.output.device) if self.draws else None
        self.forward()

    def rewind(self) -> None:
        """The forward that was queued last was in vain: another one will draw what it drew."""
        if self.before is not None:
            set_rng_state(self.output.device, self.before)
