"""HF's Trainer with FSDP2 in two processes, as it is and with layers that were sharded by themselves first."""

import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import Trainer, TrainingArguments

from hyclora import HycloraConfig, apply_hyclora
from hyclora.utils.sharded import take_cpu_too
from tests.helpers.ranks import run_ranks
from tests.helpers.small_models import llama, padded_batch

FSDP = {"version": 2, "cpu_ram_efficient_loading": False, "reshard_after_forward": True}
WAYS = ("ddp", "fsdp2", "layers first")
STEPS = 4


class OnCpuToo(Trainer):
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        take_cpu_too(self)


def losses(way: str, base: str, folder: str) -> list[float]:
    """Of each step, and that adapters are saved as they are."""
    model = llama(base=base)
    apply_hyclora(model, HycloraConfig(iteration_threshold=1))
    layers = model.get_base_model().model.layers
    if way == "layers first":
        for layer in layers:
            fully_shard(layer)
    rows = [{name: t[i].cpu() for name, t in padded_batch(rows=4).items()} for i in range(4)] * STEPS
    # which looks for layers by the name of their class, and that is another one once they are sharded
    policy = {"auto_wrap_policy": "NO_WRAP"} if way == "layers first" else {}
    fsdp = {} if way == "ddp" else {"fsdp": True, "fsdp_config": FSDP | policy}
    arguments = TrainingArguments(
        f"{folder}/{way}", max_steps=STEPS, per_device_train_batch_size=2, logging_steps=1, learning_rate=1e-2,
        save_strategy="no", report_to="none", disable_tqdm=True, gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(), **fsdp,
    )  # fmt: skip
    trainer = OnCpuToo(model, arguments, train_dataset=rows)
    trainer.train()
    units = [isinstance(module, FSDPModule) for module in (trainer.model_wrapped, *layers)]
    assert all(units) if way != "ddp" else not any(units)
    trainer.save_model()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def compare(rank: int, base: str, folder: str) -> None:
    """Two processes by each way have the losses of DDP."""
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    expected, *others = (losses(way, base, folder) for way in WAYS)
    assert len(expected) == STEPS and expected[-1] < expected[0]
    for found in others:
        assert found == pytest.approx(expected, rel=1e-3)
    dist.barrier()
    if rank == 0:
        for way in WAYS:
            assert os.path.getsize(f"{folder}/{way}/adapter_model.safetensors") > 1000


@pytest.mark.parametrize("base", ["float32", "nf4 as float32"])
def test_trainer(base, tmp_path):
    run_ranks(compare, tmp_path, base, str(tmp_path))
