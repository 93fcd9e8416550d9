"""A model in torch's wrappers for several processes, in one of them: DDP and the first FSDP train it as stock."""

import copy
from functools import partial

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hyclora import HycloraConfig, apply_hyclora
from hyclora.models.outputs import Deferred
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.replaying import CALIBRATION, graphed
from tests.helpers.small_models import largest_error, llama, padded_batch

BASELINE = HycloraConfig(layer_type="baseline")


def shard(model):
    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)


def train(model) -> dict:
    model.zero_grad()
    model(**padded_batch()).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "sharded_first, config",
    [(False, BASELINE), (True, BASELINE), (False, HycloraConfig(layers="input"))],
    ids=["slots", "slots, sharded first", "inputs"],
)
def test_the_first_kind(one_process, sharded_first, config):
    """A layer's weights are put there just before it runs, and are other ones than it had until its first forward."""
    stock = llama()
    ours = copy.deepcopy(stock)
    if sharded_first:
        ours = shard(ours)
        apply_hyclora(ours.module, config)
    else:
        apply_hyclora(ours, config)
        ours = shard(ours)
    stock = shard(stock)
    for _ in range(3):
        assert largest_error(train(ours), train(stock)) < 1e-5


def test_layers_within_the_first_kind_keep_no_input(one_process):
    """The decoder has wrappers in the place of its layers then."""
    with pytest.raises(ValueError, match=r"layers='input': .* cannot keep its input alone, as it is not patched as a"):
        apply_hyclora(shard(llama()).module, HycloraConfig(layers="input"))


def test_the_first_kind_is_not_replayed(one_process):
    model, stock = llama(), shard(llama())
    graphs = graphed(model, {"layer_type": "baseline"})
    model = shard(model)
    for _ in range(CALIBRATION + 3):
        assert largest_error(train(model), train(stock)) < 1e-5
    assert not graphs.recordings


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_data_parallel(one_process, options):
    """It looks for tensors in the outputs, of which logits are none until somebody looks."""
    found = []
    for patched in (False, True):
        model = llama()
        if patched:
            apply_hyclora(model, BASELINE)
        parallel = DistributedDataParallel(model, **options)
        for look in (False, True, False):
            parallel.zero_grad()
            outputs = parallel(**padded_batch())
            assert look or not patched or type(dict(outputs.items())["logits"]) is Deferred
            (outputs.loss + (outputs.logits.square().mean() if look else 0)).backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for ours, theirs in zip(found[3:], found[:3], strict=True):
        assert largest_error(ours, theirs) < 1e-5


def test_logits_that_nobody_looked_at_are_no_tensor():
    """What says that it is one, torch's C++ reads as one."""
    model = llama()
    apply_hyclora(model, BASELINE)
    assert not isinstance(dict(model(**padded_batch()).items())["logits"], torch.Tensor)
