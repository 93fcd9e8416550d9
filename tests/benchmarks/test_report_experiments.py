"""The tables and the picture of the experiments: mean, spread and difference over seeds, and what failed."""

import json

import pytest

from benchmarks import figures, rows
from benchmarks.experiments import VARIANTS
from benchmarks.report_experiments import (
    ALPACA,
    ARITHMETIC,
    LANGUAGE,
    alpaca_texts,
    experiments,
    one_table,
    other_experiments,
)

EXACT, TWO = "exact LoRA", "intra_inter, 2 bit"


def line(variant: str, seed: int, loss: float | None, before: float | None = None, **changes) -> dict:
    versions = dict.fromkeys(("torch", "triton", "transformers", "peft"), "1")
    found = {"device": "NVIDIA H200", "commit": "c" * 40, "versions": versions, "arguments": {}}
    found |= {"task": "gsm8k", "variant": variant, "seed": seed, "model": "smollm2-135m"}
    found |= {"setting": rows.whole(VARIANTS[variant])}
    if loss is not None:
        metrics = {"test_loss": {"after": loss}, "accuracy": {"after": 0.05}}
        if before is not None:
            metrics = {name: {"before": before, **scores} for name, scores in metrics.items()}
        found |= {"metrics": metrics, "kept_bits": None if variant == EXACT else 2.3}
    return found | changes


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)

    def write(*lines):
        (tmp_path / "experiments.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))

    return write


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines() if row[:1] == "|"]


def test_difference_to_the_same_seed_in_spreads_of_exact(write):
    write(
        *(line(EXACT, seed, loss, before=1.5 if seed == 0 else None) for seed, loss in enumerate((0.70, 0.72, 0.74))),
        *(line(TWO, seed, loss) for seed, loss in enumerate((0.71, 0.73, 0.75))),
    )
    head, _, before, exact, two = cells(one_table(LANGUAGE))
    assert head[:3] == ["smollm2-135m, 3 seeds", "bits kept", "GSM8K answer loss"]
    assert before[:3] == ["not trained", "", "1.5000"] and before[4] == "150.00"
    assert exact[:4] == [EXACT, "16.00", "0.7200 ± 0.0200", ""]
    assert two[:5] == [TWO, "2.30", "0.7300 ± 0.0200", "+0.0100 (+0.5)", "5.00 ± 0.00"]


def test_a_variant_judged_by_its_loss_alone(write):
    write(line(EXACT, 0, 0.70), line(TWO, 0, 0.71, metrics={"test_loss": {"after": 0.71}}))
    *_, two = cells(one_table(LANGUAGE))
    assert two[2:5] == ["0.7100", "+0.0100", ""]


def test_a_cell_tells_of_seeds_that_it_lacks(write):
    failed = line(TWO, 1, None, error="RunStopped: out of memory")
    write(line(EXACT, 0, 0.70), line(EXACT, 1, 0.72), line(TWO, 0, 0.71), failed)
    *_, exact, two = cells(one_table(LANGUAGE))
    assert exact[2] == "0.7100 ± 0.0141" and two[2:4] == ["0.7100 (1 of 2 seeds)", "+0.0100 (+0.7)"]


def test_a_seed_that_exact_lacks_has_no_difference(write):
    write(line(EXACT, 0, 0.70), line(TWO, 1, 0.80), line(TWO, 0, 0.71))
    *_, two = cells(one_table(LANGUAGE))
    assert two[2:4] == ["0.7550 ± 0.0636", "+0.0100"]


def test_a_failure_is_told_until_the_run_is_done(write):
    failed = line(TWO, 0, None, error="RunStopped: out of memory")
    write(line(EXACT, 0, 0.70), failed)
    assert "*Failed: gsm8k, intra_inter, 2 bit, seed 0: RunStopped: out of memory.*" in one_table(LANGUAGE)
    write(line(EXACT, 0, 0.70), failed, line(TWO, 0, 0.71))
    assert "Failed" not in one_table(LANGUAGE)


def test_variants_that_there_are_no_more_are_not_told(write):
    write(line(EXACT, 0, 0.70), line(TWO, 0, 0.71) | {"variant": f"former {TWO}"})
    assert f"former {TWO}" not in one_table(LANGUAGE) and len(cells(one_table(LANGUAGE))) == 3


def test_lines_of_a_cpu_give_way_to_those_of_a_gpu(write):
    write(line(EXACT, 0, 0.70), line(EXACT, 1, 9.0, device="CPU x86_64"))
    assert cells(one_table(LANGUAGE))[2][2] == "0.7000"


def test_nothing_is_shown_of_what_was_not_run(write):
    write()
    assert experiments() == other_experiments() == "" and figures.loss_bits() is None
    write(line(EXACT, 0, 0.70), line(TWO, 0, 0.71))
    assert one_table(ARITHMETIC) == "" and "GLUE" not in experiments() + other_experiments()
    (axes,) = figures.loss_bits().axes
    assert axes.get_ylabel() == "GSM8K answer loss" and len(axes.containers) == 1


def test_what_was_written_after_the_prompts(write):
    def texts(after: str) -> dict:
        found = {"before": "so | so", "after": after}
        return {when: {"texts": [{"prompt": "I\nam", "text": text}]} for when, text in found.items()}

    write()
    assert alpaca_texts() == ""
    alpaca = {"task": "alpaca", "metrics": {"held-out_loss": {"before": 2.0, "after": 1.5}}}
    write(line(TWO, 0, 1.5, **alpaca, texts=texts("<b>")), line(EXACT, 0, 1.5, **alpaca, texts=texts("a_b")))
    head, _, row = cells(alpaca_texts())
    assert head == ["what smollm2-135m writes after", "not trained", EXACT, TWO]
    assert row == ["I<br>am", "so &#124; so", "a\\_b", "&lt;b&gt;"]
    assert cells(one_table(ALPACA))[2][2] == "2.0000" and "Alpaca's instructions" in other_experiments()
