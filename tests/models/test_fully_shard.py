"""Models whose weights two processes share by fully_shard (FSDP2), each having the whole of one layer at a time."""

import gc
from dataclasses import replace
from types import SimpleNamespace
from weakref import ref

import pytest
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.models.patch import find_patch
from hyclora.models.state import _savers
from hyclora.operators.store import CudaCopies
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.offloading import equal, offloaded
from tests.helpers.ranks import run_ranks
from tests.helpers.replaying import CALIBRATION, batches, graphed
from tests.helpers.small_models import gradients, is_late, largest_error, llama, padded_batch, roberta

N_STEPS = CALIBRATION + 2
CONFIGS = {
    "exact": HycloraConfig(layer_type="baseline", iteration_threshold=CALIBRATION),
    "4 bit": HycloraConfig(iteration_threshold=CALIBRATION),
}


def shard(model, head: bool = True, **options):
    """Layer by layer, then the rest; head: embeddings and head by themselves, as accelerate has it."""
    causal = model.get_base_model()
    for layer in causal.model.layers:
        fully_shard(layer, **options)
    if head:
        fully_shard(causal.model.embed_tokens, **options)
        fully_shard([causal.lm_head], **options | {"reshard_after_forward": False})
    return fully_shard(model, **options)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def train(model, steps: list[dict]) -> list[dict]:
    """Gradients of each step."""
    found = []
    for batch in steps:
        model.zero_grad()
        model(**batch).loss.backward()
        grads = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
        found.append({n: whole(grad) for n, grad in grads.items() if grad is not None})
    return found


def statistics(model) -> dict[str, bytes]:
    """All that calibration has found."""
    patch = find_patch(model)
    found = {f"{key}.{name}": t for key, saver in _savers(patch) for name, t in saver.state_dict().items()}
    return {name: t.cpu().numpy().tobytes() for name, t in (found | patch.calibration.state_dict()[1]).items()}


def patch(model, config: HycloraConfig, offload: bool) -> None:
    if offload:
        gpu = torch.device("cuda", torch.cuda.current_device()) if DEVICE == "cuda" else None
        offloaded(model, config, gpu and CudaCopies(gpu))
    else:
        apply_hyclora(model, config)


def compare(rank: int, base: str, stores: tuple[bool, ...]) -> None:
    """Two processes with one on both batches, with DDP, and with each other; stores: whether slots are offloaded."""
    steps = [batches(2 * N_STEPS)[2 * i : 2 * i + 2] for i in range(N_STEPS)]
    both = [{name: torch.cat((a[name], b[name])) for name in a} for a, b in steps]
    mine = [pair[rank] for pair in steps]
    stock = llama(base=base)
    joined = [gradients(stock, batch)[1] for batch in both]
    for name, config in CONFIGS.items():
        found = {}
        for offload in stores:
            model = llama(base=base)
            patch(model, config, offload)
            found[offload] = train(shard(model), mine)
            weights = list(model.get_base_model().model.layers[0].parameters())
            assert all(isinstance(p, DTensor) for p in weights)
            held = [None, None]
            dist.all_gather_object(held, statistics(model))
            assert held[0] == held[1]
            assert held[0] or name == "exact"
        ours = found[True]
        assert all(equal(a, b) for a, b in zip(found.get(False, ours), ours, strict=True))
        if name == "exact":
            assert all(largest_error(a, b) < 1e-5 for a, b in zip(ours, joined, strict=True))
            continue
        model = llama(base=base)
        patch(model, config, offload=False)
        parallel = train(DistributedDataParallel(model), mine)
        assert all(largest_error(a, b) < 1e-6 for a, b in zip(ours, parallel, strict=True))


def compare_all(rank: int) -> None:
    for base in ("float32", "nf4 as bfloat16", "nf4 as float32"):
        compare(rank, base, (False, True) if base == "float32" else (True,))


def test_two_processes(tmp_path):
    """As one on the rows of both, whatever dtype the bytes of a 4-bit base have, and wherever slots wait."""
    run_ranks(compare_all, tmp_path)


def sharded(config: HycloraConfig = CONFIGS["exact"], base: str = "float32", **options):
    model = llama(base=base)
    apply_hyclora(model, config)
    return shard(model, **options)


@pytest.fixture
def exact(one_process) -> dict:
    """Stock gradients of padded_batch()."""
    return train(llama(), [padded_batch()])[0]


def error_of(model, exact: dict) -> float:
    return max(largest_error(found, exact) for found in train(model, [padded_batch()] * 2))


@pytest.mark.parametrize("head", [False, True])
def test_a_model_may_be_sharded_before_it_is_patched(exact, head):
    model = shard(llama(), head)
    report = apply_hyclora(model, CONFIGS["exact"])
    assert "cuda_graphs: off, fully_shard gathers the weights of a layer when that runs" in str(report)
    assert report.head is not None and report.last_norm
    assert error_of(model, exact) < 1e-5


@pytest.mark.parametrize("way", ["nothing else", "layers kept whole after forward", "the model as one", "stream"])
def test_ways_to_shard(exact, way, shapes):
    """All layers run as a whole, whatever is gathered when."""
    model = llama()
    apply_hyclora(model, replace(CONFIGS["exact"], stream=way == "stream"))
    if way == "the model as one":
        fully_shard(model)
    else:
        shard(model, reshard_after_forward=way != "layers kept whole after forward")
    assert error_of(model, exact) < 1e-5
    assert all(block.together for block in find_patch(model).watch.layers)
    real = int(padded_batch()["attention_mask"].sum())
    # a GPU's kernel for rows behind each other takes half precision alone
    assert (shapes[0] == (1, real)) == (way == "stream" and DEVICE == "cpu")


@pytest.mark.parametrize("way", ["the model", "layers too"])
def test_layers_that_are_all_gathered_at_once_are_told_of(one_process, caplog, way):
    """As accelerate has it that is given PEFT's fsdp_auto_wrap_policy."""
    model = llama()
    apply_hyclora(model, CONFIGS["exact"])
    shard(model) if way == "layers too" else fully_shard(model)
    train(model, [padded_batch()] * 2)
    assert caplog.text.count("the layers are sharded as one unit, so the weights of all of them are gathered") == (
        way == "the model"
    )


@pytest.mark.parametrize("sharded_first", [False, True])
def test_an_encoder(one_process, sharded_first):
    """Half of whose layers is in no module but the layer itself."""
    model = roberta()
    (stock,) = train(model, [padded_batch()])
    if not sharded_first:
        apply_hyclora(model, CONFIGS["exact"])
    for layer in model.get_base_model().roberta.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    if sharded_first:
        apply_hyclora(model, CONFIGS["exact"])
    assert largest_error(train(model, [padded_batch()])[0], stock) < 1e-5


def test_whole_weights_go_when_a_patched_model_is_sharded(one_process):
    model = llama()
    apply_hyclora(model, CONFIGS["exact"])
    train(model, [padded_batch()])
    frozen = [ref(p) for n, p in model.named_parameters() if "base_layer" in n or "norm" in n]
    shard(model)
    gc.collect()
    assert not any(weight() is not None for weight in frozen)


def test_layers_of_sharded_models_are_not_replayed(exact, caplog):
    model = llama()
    graphs = graphed(model, {"layer_type": "baseline"})
    shard(model)
    for _ in range(2):
        assert error_of(model, exact) < 1e-5
    assert not graphs.recordings and "cuda_graphs is off: fully_shard gathers" in caplog.text


@pytest.mark.parametrize("way", ["not reentrant", "reentrant", "in a store"])
def test_gradient_checkpointing(exact, way):
    """The input of a layer is kept by torch, or by a store."""
    model = llama()
    patch(model, CONFIGS["exact"], offload=way == "in a store")
    shard(model)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": way == "reentrant"})
    if way == "reentrant":
        model.enable_input_require_grads()
    if way == "in a store" and "__init_subclass__" not in vars(GradientCheckpointingLayer):  # transformers 5.17
        with pytest.raises(ValueError, match="install transformers 5.24 or newer"):
            error_of(model, exact)
        return
    assert error_of(model, exact) < 1e-5


@pytest.mark.parametrize("way", ["exact", "8 bit"])
def test_a_part_of_a_layer_that_is_sharded_after_checkpointed_steps(exact, way):
    """Torch's own checkpointing gathers it in both runs; ours would not, and is refused."""
    model = llama()
    savers = {"slot_savers": {"layer_in": "quant8"}} if way == "8 bit" else {}
    apply_hyclora(model, replace(CONFIGS["exact"], **savers))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert error_of(model, exact) < (1e-5 if way == "exact" else 0.1)
    fully_shard(model.get_base_model().model.layers[1].mlp)
    if way == "exact":
        assert error_of(model, exact) < 1e-5
        return
    with pytest.raises(ValueError, match=r"layers\.1: fully_shard gathers weights inside .* give it whole layers"):
        train(model, [padded_batch()])


@pytest.mark.parametrize("base", ["float32", "nf4 as bfloat16"])
@pytest.mark.parametrize("mixed", [None, "bf16"])
@pytest.mark.parametrize("sent", [False, True], ids=["each loads", "the first one sends"])
def test_as_accelerate_shards(one_process, base, mixed, sent):
    """It asks for a GPU, so without one its function is called by itself; sent: weights are those of one process."""
    model, stock = llama(base=base), llama(base=base)
    apply_hyclora(model, CONFIGS["exact"])
    exact = train(stock, [padded_batch()])[0]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=sent
    )
    plugin.set_mixed_precision(mixed) if mixed else None
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision=mixed or "no",
        is_main_process=True,
        device=torch.device(DEVICE),
    )
    fsdp2_prepare_model(accelerator, model)
    assert isinstance(model.get_base_model().lm_head, FSDPModule)
    outputs = model(**padded_batch())
    assert is_late(outputs)
    outputs.loss.backward()
    found = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    assert largest_error(found, exact) < (5e-2 if mixed else 1e-5)
    assert all(block.together for block in find_patch(model).watch.layers)


def test_adapters_are_saved_as_one_process_saves_them(one_process, tmp_path):
    folders = []
    for split in (False, True):
        model = llama()
        apply_hyclora(model, CONFIGS["exact"])
        if split:
            shard(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(**padded_batch()).loss.backward()
        optimizer.step()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        folders.append(tmp_path / str(split))
        model.save_pretrained(folders[-1], state_dict=get_model_state_dict(model, options=options) if split else None)
    one, ours = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert largest_error(ours, {name: t.cpu() for name, t in one.items()}) < 1e-6


@pytest.mark.parametrize("head", [False, True])
def test_logits_that_somebody_looks_at(exact, head):
    """Those of padded tokens too, which take the decoder's forward once more."""
    model, stock = llama(), llama()
    apply_hyclora(model, CONFIGS["exact"])
    shard(model, head)
    outputs = model(**padded_batch())
    assert is_late(outputs)
    assert torch.allclose(outputs.logits, stock(**padded_batch()).logits, atol=1e-5)
    outputs.loss.backward()


def test_evaluation_and_stock_training(exact):
    model, stock = sharded(), llama()
    train(model, [padded_batch()])
    with torch.no_grad():
        assert torch.equal(model.eval()(**padded_batch()).logits, stock.eval()(**padded_batch()).logits)
    assert error_of(model.train(), exact) < 1e-5
    remove_hyclora(model)
    assert error_of(model, exact) == 0


def shard_adapters(model) -> None:
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            fully_shard(module)


def shard_halves(model) -> None:
    for layer in model.get_base_model().model.layers:
        fully_shard(layer.self_attn)
        fully_shard(layer.mlp)


@pytest.mark.parametrize("shard_parts", [shard_adapters, shard_halves])
def test_parts_of_layers_that_are_sharded_alone_are_refused(one_process, shard_parts):
    model = llama()
    apply_hyclora(model, CONFIGS["exact"])
    shard_parts(model)
    fully_shard(model)
    with pytest.raises(ValueError, match=r"self_attn.*: fully_shard was given a part of a layer; give it whole layers"):
        train(model, [padded_batch()])


def test_bytes_that_mixed_precision_would_cast_are_refused(one_process):
    model = sharded(base="nf4 as float32", mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"4-bit weight \[96, 96\] were cast to torch.bfloat16: load the model with"):
        train(model, [padded_batch()])


@pytest.mark.parametrize("patched_first", [False, True])
def test_deepspeed_zero_3_is_refused(patched_first):
    """Whose mark is on the parameters, and whose hooks are on the modules."""
    model = llama()
    if patched_first:
        apply_hyclora(model, CONFIGS["exact"])
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: None)
    for i, parameter in enumerate(model.parameters()):
        parameter.ds_id = i
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3 has its weight in parts; use ZeRO-2, DDP, or FSDP2"):
        train(model, [padded_batch()]) if patched_first else apply_hyclora(model, CONFIGS["exact"])


class Bytes(nn.Module):
    """Frozen bytes typed as floats, beside a trained weight."""

    def __init__(self, trained: bool):
        super().__init__()
        self.pairs = nn.Parameter(torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16), False)
        self.words = nn.Parameter(self.nans().view(torch.float32), False) if trained else None
        self.trained = nn.Parameter(torch.ones(6)) if trained else None
        self.seen = None

    @staticmethod
    def nans() -> torch.Tensor:
        """Quiet and signalling ones of both signs, each bit of the payload set in some."""
        payload = torch.randint(1, 2**23, (4096,), generator=torch.Generator().manual_seed(0))
        payload = torch.cat((payload, 2 ** torch.arange(23), torch.tensor([2**22 - 1])))
        bits = payload + 0x7F800000
        return torch.cat((bits, bits - 2**31)).to(torch.int32)

    def forward(self, x):
        self.seen = [p.detach().view(torch.uint8).clone() for p in (self.pairs, self.words) if p is not None]
        return x if self.trained is None else x + self.trained


def gather_bytes(rank: int) -> None:
    """By themselves, where torch gathers them as bfloat16, and among other dtypes."""
    for trained in (False, True):
        module = Bytes(trained).to(DEVICE)
        module(torch.ones(6, device=DEVICE))
        expected = module.seen
        policy = MixedPrecisionPolicy() if trained else MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        fully_shard(module, mp_policy=policy)
        for _ in range(2):
            module(torch.ones(6, device=DEVICE)).sum()
            assert all(map(torch.equal, module.seen, expected))


def test_bytes_typed_as_floats_are_gathered_as_they_were(tmp_path):
    """Copies of them have rewritten patterns of NaN elsewhere."""
    run_ranks(gather_bytes, tmp_path)
