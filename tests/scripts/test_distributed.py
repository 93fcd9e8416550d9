"""Two ranks calibrate alike, whatever each of them sees, and whether or not it sees it in tiles; stop alike; and have
one folder, as those of several machines may not.
"""

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl

import run_gsm8k
from hyclora.models.finite import FiniteGradients
from hyclora.operators.savers import ChannelQuant, Keeper, Observer, Step
from hyclora.utils import results
from hyclora.utils.errors import UserError
from hyclora.utils.runs.run import Run, begin
from hyclora.utils.trainer import StopOnSignal
from tests.helpers import ranks


def calibrate(rank: int, folder: str) -> None:
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(rank)) * (1 + 3 * rank) + rank
    for rule in ("channel_group", "paper"):
        saver = ChannelQuant(4, rule, 0.1)
        step = Step(threshold=1, index=1)
        if rank:
            observer = Observer(Keeper({"a": saver}, step), len(x))
            for observer.rows in (slice(0, 30), slice(30, 50)):
                observer.keep("a", x[observer.rows])
            observer.calibrate()
        saver.pack(x, step)
        torch.save((x, saver.mean, saver.std, saver.outliers), f"{folder}/{rule}{rank}.pt")


def stop(rank: int) -> None:
    callback, args = StopOnSignal(), SimpleNamespace(world_size=2, device=torch.device("cpu"))
    for step in range(3):
        if (rank, step) == (1, 1):
            callback.received = signal.SIGTERM
        control = TrainerControl()
        callback.on_step_end(args, None, control)
        assert control.should_save == control.should_training_stop == (step >= 1)
    finite = FiniteGradients(torch.nn.Linear(2, 2), "skip")
    for step in range(3):
        assert finite.allows(step, torch.tensor(float("nan") if (rank, step) == (1, 1) else 1.0)) == (step != 1)


def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_a_nan_of_one_is_skipped_by_all(tmp_path):
    ranks.run_ranks(stop, tmp_path)


def begin_apart(rank: int, folder: str, model: str) -> None:
    """A new run in one folder, then in one that the second process has not, then from a checkpoint of its own."""
    start_run = results.start_run
    argv = ["--model_dir", model, "--output_dir", folder, "--use_cpu", "True", "--run_name", "same"]
    assert begin(run_gsm8k.DRIVER.parse(argv), model, [], argv).folder.is_dir()
    results.start_run = lambda *args: start_run(*args).with_name("same" if rank else "first")
    Path(folder, "first").mkdir(exist_ok=True)
    Path(folder, "first", results.SETTINGS).touch()
    with pytest.raises(UserError, match=r"process 1 on \S+ .* set --output_dir to a folder that all machines share"):
        begin(run_gsm8k.DRIVER.parse(argv), model, [], argv)
    with pytest.raises(UserError, match="process 1 on .*checkpoint-4, the first one checkpoint-2"):
        Run(Path(folder, "first"), (), argv, model, Path(folder, "first", f"checkpoint-{2 + 2 * rank}")).check_shared()


def test_a_run_whose_folder_is_not_on_all_machines_is_refused_by_all(tiny_llama_folder, tmp_path):
    ranks.run_ranks(begin_apart, tmp_path, str(tmp_path), str(tiny_llama_folder))


def test_statistics_are_those_of_all_ranks(tmp_path):
    ranks.run_ranks(calibrate, tmp_path, str(tmp_path))
    for rule in ("channel_group", "paper"):
        (x0, *first), (x1, *second) = (torch.load(tmp_path / f"{rule}{rank}.pt") for rank in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        x = torch.cat((x0, x1))
        if rule == "paper":
            assert torch.allclose(first[1], (x.amax(dim=0) - x.amin(dim=0)) / 15, rtol=1e-5)
        else:
            assert torch.allclose(first[0], x.mean(dim=0), atol=1e-5)
            assert torch.allclose(first[1], x.std(dim=0, correction=0), rtol=1e-4)
