"""A model in FSDP's shards: the first kind trains as stock does, the second one's weights are no tensors of ours."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hyclora import HycloraConfig, apply_hyclora
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.small_models import largest_error, llama, padded_batch

BASELINE = HycloraConfig(layer_type="baseline")


@pytest.fixture
def one_process(tmp_path):
    backend = {"cpu": "gloo", "cuda": "nccl"}[DEVICE]
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model):
    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)


def train(model) -> dict:
    model.zero_grad()
    model(**padded_batch()).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("sharded_first", [False, True])
def test_the_first_kind(one_process, sharded_first):
    """A layer's weights are put there just before it runs, and are other ones than it had until its first forward."""
    stock = llama()
    ours = copy.deepcopy(stock)
    if sharded_first:
        ours = shard(ours)
        apply_hyclora(ours.module, BASELINE)
    else:
        apply_hyclora(ours, BASELINE)
        ours = shard(ours)
    stock = shard(stock)
    for _ in range(3):
        assert largest_error(train(ours), train(stock)) < 1e-5


@pytest.mark.parametrize("sharded_first", [False, True])
def test_the_second_kind_is_refused(one_process, sharded_first):
    model = llama()
    if not sharded_first:
        apply_hyclora(model, BASELINE)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    with pytest.raises(ValueError, match="a weight of type DTensor is not supported; so no layer"):
        apply_hyclora(model, BASELINE) if sharded_first else train(model)
