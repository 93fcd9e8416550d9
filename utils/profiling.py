"""What a training step costs: the bytes that autograd keeps until backward, GPU memory, time."""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hyclora.models.config import HycloraConfig
from hyclora.models.patch import patch_of
from hyclora.models.sharding import local

MIB = 2**20
AFTER_CALIBRATION = 2  # forwards: a kind of input is recorded as CUDA graphs the second time that it comes


@contextlib.contextmanager
def undisturbed(model: nn.Module, *, train: bool):
    """Put the model into training or eval mode; mode and random state come back as they were."""
    devices = [parameter.device for parameter in model.parameters() if parameter.is_cuda][:1]
    mode = model.training
    with torch.random.fork_rng(devices):
        model.train(train)
        try:
            yield
        finally:
            model.train(mode)


def graphs_of(model: nn.Module):
    """The LayerGraphs of a patched model, None without any."""
    return getattr(patch_of(model), "graphs", None)


def layer_by_layer(model: nn.Module):
    """No CUDA graphs inside: what a graph keeps and launches is not seen from outside."""
    graphs = graphs_of(model)
    return contextlib.nullcontext() if graphs is None else graphs.paused()


def buffered_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes of the storages that one training forward of `batch` saves for backward on the model's device: `buffered`
    of one kind.
    """
    return sum(buffered(model, batch, lambda tensor: "kept").values())


def buffered(model: nn.Module, batch: dict[str, Tensor], kind_of: Callable[[Tensor], str]) -> dict[str, int]:
    """The bytes that one training forward of `batch` saves for backward on the model's device, by kind.

    kind_of: told by a saved tensor, when its storage is saved first; what HyC-LoRA's store holds is "kept".

    A storage counts once however many operators save views of it; parameters, buffers and the batch itself do not
    count, as they live anyway. With offload=True, host memory does not count (the patch's store knows it), but what the
    store has on the device when the forward ends does. Random state, gradients and training mode are left as they were.
    """
    resident = [*model.parameters(), *model.buffers(), *batch.values()]
    known = {local(tensor).untyped_storage().data_ptr() for tensor in resident}
    # Holding the storages keeps their addresses from being given to a later tensor.
    kept: dict[int, tuple[str, torch.UntypedStorage]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # that of a weight which was gathered is not known, and lives for its layer only
        of_weight = isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)
        if not of_weight and storage.data_ptr() not in known and storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = kind_of(tensor.detach()), storage
        # an operator that holds its own output in a hook's result would never be freed
        return tensor if tensor.grad_fn is None else tensor.detach()

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with undisturbed(model, train=True), layer_by_layer(model), hooks:
        output = model(**batch)
        patch = patch_of(model)
        in_store = patch.store.device_bytes if patch is not None and patch.store is not None else 0
        del output
    sizes = {"kept": in_store}
    for kind, storage in kept.values():
        sizes[kind] = sizes.get(kind, 0) + storage.nbytes()
    return sizes


def random_batch(vocab: int, batch_size: int, seq_len: int, device: torch.device | str) -> dict[str, Tensor]:
    """Random tokens, none of them padding, each of them a label."""
    ids = torch.randint(0, vocab, (batch_size, seq_len), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def host_bytes(model: nn.Module) -> int:
    """Host memory of what is offloaded: HyC-LoRA's slots and embeddings; of a model without it all that is pinned."""
    patch = patch_of(model)
    if patch is not None:
        holders = patch.store and patch.store.host_bytes, patch.embedding and patch.embedding.nbytes
        return sum(filter(None, holders))
    pinned = torch.cuda.host_memory_stats()
    return pinned.get("active_bytes.current", pinned.get("allocated_bytes.current", 0))


def pinned_bytes(model: nn.Module) -> int:
    """Host memory that HyC-LoRA's store holds for offloaded activations, whether or not any are in it."""
    store = getattr(patch_of(model), "store", None)
    return 0 if store is None else store.arena.pinned


def gradients_and_state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What is on the GPU of gradients and of an optimizer's state."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    state = [t for values in optimizer.state.values() for t in values.values()]
    return [t for t in (*(p.grad for p in trained), *state) if isinstance(t, Tensor) and t.is_cuda]


def random_micro_step(
    model: nn.Module, batch_size: int, seq_len: int, warm_up_seq_len: int | None, device: torch.device | str
) -> "MicroStep":
    """A MicroStep on random tokens, warmed up on sequences of warm_up_seq_len if given."""
    lengths = (seq_len, warm_up_seq_len or seq_len)
    return MicroStep(model, *(random_batch(model.config.vocab_size, batch_size, n, device) for n in lengths))


class MicroStep:
    """A forward and a backward of a LoRA model, warmed up: calibration, autotuning and Adam's state are over.

    The model is changed: its LoRA B are drawn anew, as zeros would make half of the gradients zero, and it is trained.
    """

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], warm_up_batch: dict[str, Tensor] | None = None):
        self.model, self.batch, self.seen = model.train(), batch, 0
        self.device = batch["input_ids"].device
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=1e-3)
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        at = getattr(patch_of(model), "step", None)
        threshold = HycloraConfig().iteration_threshold if at is None else at.threshold
        for _ in range(threshold + AFTER_CALIBRATION):
            self.forward(warm_up_batch or batch).backward()
        while at is not None and at.index < at.threshold + AFTER_CALIBRATION:  # few tokens calibrate longer
            self.forward(warm_up_batch or batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss, in bfloat16 autocast on a GPU."""
        self.seen += batch is self.batch
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.model(**batch).loss

    def memory(self) -> dict[str, float]:
        """MiB of GPU memory; on a CPU only what autograd keeps can be told.

        static: weights, adapters, gradients and optimizer, of which trained is all but the frozen weights. buffered:
        allocated over static after the forward, and host what is offloaded by then. dyn: peak over static. held:
        what the allocator took of the GPU for that, gaps between tensors included. With CUDA graphs the peak is that of
        the step that records them, in which the allocator sees all tensors.
        """
        if self.device.type != "cuda":
            return {"buffered_mib": round(buffered_bytes(self.model, self.batch) / MIB, 3)}
        trained = [p for p in self.model.parameters() if p.requires_grad]
        trained += gradients_and_state(self.optimizer)
        graphs = graphs_of(self.model)
        if graphs is not None:
            graphs.clear()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        static = torch.cuda.memory_allocated()
        with layer_by_layer(self.model):
            loss = self.forward(self.batch)
            torch.cuda.synchronize()
            buffered, host = torch.cuda.memory_allocated() - static, host_bytes(self.model)
            loss.backward()
        del loss
        if graphs is not None:
            self.forward(self.batch).backward()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.forward(self.batch).backward()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        found = {
            "static": static,
            "trained": sum(t.numel() * t.element_size() for t in trained),
            "buffered": buffered,
            "host": host,
            "peak": peak,
            "dyn": peak - static,
            "held": torch.cuda.max_memory_reserved() - static,
        }
        return {f"{name}_mib": round(size / MIB, 1) for name, size in found.items()}

    def seconds(self, steps: int) -> list[float]:
        """Times of so many micro-steps, each until the device is done; self.loss is that of the last."""
        # calibration may have been on other batches, and what is new about this one is not to be timed
        for _ in range((AFTER_CALIBRATION if graphs_of(self.model) else 1) - self.seen):
            self.forward(self.batch).backward()
        times = []
        for _ in range(steps):
            self._synchronize()
            start = time.perf_counter()
            loss = self.forward(self.batch)
            loss.backward()
            self._synchronize()
            times.append(time.perf_counter() - start)
        self.loss = loss.detach()
        return times

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def throughput(self, steps: int) -> dict[str, float]:
        """Median time of a micro-step with its spread, and what it means in sequences and tokens."""
        times = self.seconds(steps)
        median = statistics.median(times)
        return {
            "ms": round(1e3 * median, 1),
            "ms_range": [round(1e3 * min(times), 1), round(1e3 * max(times), 1)],
            "steps_per_second": round(1 / median, 3),
            "sequences_per_second": round(len(self.batch["input_ids"]) / median, 2),
            "tokens_per_second": round(self.batch["input_ids"].numel() / median),
            "loss": round(self.loss.item(), 4),
        }
