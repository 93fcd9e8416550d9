"""Which rows a step of the plain loop takes."""

from types import SimpleNamespace

from run_alpaca import micro_batches


def job(rows: int, size: int, accumulation: int) -> SimpleNamespace:
    """Rows that are numbers, and batches that are lists of them."""
    training = SimpleNamespace(per_device_train_batch_size=size, gradient_accumulation=accumulation, seed=3)
    return SimpleNamespace(training=training, task=SimpleNamespace(train=list(range(rows))), collate=list)


def test_every_epoch_has_each_row_once_in_an_order_of_its_own():
    steps = list(micro_batches(job(10, 2, 2), 0, 6))
    first, second = (sum((batch for step in part for batch in step), []) for part in (steps[:3], steps[3:]))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert [[len(batch) for batch in step] for step in steps[:3]] == [[2, 2], [2, 2], [2]]


def test_what_is_left_is_what_would_have_followed():
    steps = list(micro_batches(job(10, 2, 2), 0, 6))
    assert list(micro_batches(job(10, 2, 2), 4, 6)) == steps[4:]


def test_more_accumulation_than_rows_is_one_step_of_all():
    ((*batches,),) = micro_batches(job(3, 2, 100), 0, 1)
    assert [len(batch) for batch in batches] == [2, 1]
