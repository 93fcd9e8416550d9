"""How far a plain loop is: which steps count as skipped, what the average loss is of, and what is told meanwhile."""

import pytest
import torch
from torch import nn

from hyclora.utils.plain.progress import Progress

BATCHES = [{"input_ids": torch.ones(1, 4), "attention_mask": torch.ones(1, 4)}]


@pytest.mark.parametrize(
    "first, scales, skipped",
    [(8.0, [8.0, 8.0], 0), (8.0, [4.0, 4.0], 1), (8.0, [8.0, 4.0], 1), (8.0, [4.0, 2.0], 2), (8.0, [16.0, 16.0], 0)],
    ids=["none", "the first", "a later one", "both", "the scale grows"],
)
def test_a_step_that_lowers_the_scale_was_skipped(first, scales, skipped):
    """The first one too, where a scale that is too large is found out."""
    progress = Progress(nn.Linear(1, 1), torch.device("cpu"), len(scales), 10, first)
    for scale in scales:
        progress.count(torch.tensor(1.0), BATCHES, 3, scale)
    assert progress.result()["skipped_steps"] == skipped


def test_the_average_is_of_tokens_and_what_is_told_of_steps(capsys):
    """A step that was not taken is in neither."""
    progress = Progress(nn.Linear(1, 1), torch.device("cpu"), 3, 3, 1.0)
    for loss, targets, skipped in ((1.0, 3, False), (float("nan"), 9, True), (3.0, 1, False)):
        progress.count(torch.tensor(loss), BATCHES, targets, 1.0, skipped)
    assert progress.result()["average_loss"] == (3 * 1.0 + 1 * 3.0) / 4
    assert capsys.readouterr().out == "step 3 of 3: loss 2.0000\n"
