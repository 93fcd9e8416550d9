"""Which GPUs the processes of a test see. They import what this file does, and that is little."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from tests.helpers import ranks


def see(rank: int, folder: str) -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()
    assert torch.distributed.get_backend() == "gloo" and not torch.accelerator.is_available()
    Path(folder, str(rank)).touch()


def test_processes_that_would_share_a_gpu_see_none(tmp_path, monkeypatch):
    """Started as on a machine with one: they import torch when it is hidden already."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(ranks, "forked", lambda: multiprocessing.get_context("spawn"))
    ranks.run_ranks(see, tmp_path, str(tmp_path))
    assert {"0", "1"} < {file.name for file in tmp_path.iterdir()}


@pytest.mark.parametrize("gpus, seen", [(1, ""), (2, "4,5")])
def test_processes_that_have_a_gpu_each_see_them(gpus, seen, tmp_path, monkeypatch):
    found = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(ranks.mp, "start_processes", lambda *_, **__: found.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    ranks.run_ranks(see, tmp_path, str(tmp_path))
    assert found == [seen] and os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"
