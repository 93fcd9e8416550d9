"""benchmarks.faults: a run that is broken and goes on, what is done to checkpoints, and the table."""

import json

import pytest

from benchmarks import faults, report_kills, rows
from benchmarks.faults import FAULTS, Fault
from tests.helpers.forked import forked


def test_a_broken_run_goes_on_to_the_end_of_the_unbroken_one(tiny_llama_folder, tmp_path, monkeypatch):
    forked()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # kernels are for other tests
    asked = ["--faults", "out of memory", "a loss of NaN, non_finite=skip"]
    faults.main(["--model", str(tiny_llama_folder), "--output_dir", str(tmp_path), *asked])
    broken, skipped = map(json.loads, (tmp_path / "faults.jsonl").read_text().splitlines())
    assert broken["exit_code"] == 1 and broken["sentences"] == 1 and not broken["traceback"]
    assert broken["resumed_from"] == 4 and broken["differ"] == []
    assert skipped["exit_code"] == 0 and skipped["skipped"] == 1 and skipped["finite"]


def test_a_fault_comes_once():
    class Owner:
        def method(self, x):
            return x

    faults._break(Owner, Fault("method", 2, lambda result: -result))
    assert [Owner().method(x) for x in (1, 2, 3)] == [1, -2, 3]


@pytest.mark.parametrize("fault", [fault for fault in FAULTS.values() if fault.damage], ids=lambda f: f.damage.__name__)
def test_damage_is_seen(fault, tmp_path):
    (tmp_path / faults.ADAPTERS).write_bytes(b"a" * 200)
    (tmp_path / "optimizer.pt").write_bytes(b"b")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    fault.damage(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} != before


def test_table(tmp_path, monkeypatch):
    versions = dict.fromkeys(("torch", "triton", "transformers", "peft"), "1")
    common = {"time": "", "commit": "c", "device": "X1", "versions": versions, "setting": "run_gsm8k", "model": "m"}
    common |= {"arguments": {}, "exit_code": 1, "sentences": 1, "traceback": False, "resumed_from": 2, "torn": 1}
    lines = [{"fault": "a", "differ": []}, {"fault": "b", "differ": ["losses"]}, {"fault": "c", "error": "exit code 2"}]
    lines += [{"fault": "d", "skipped": 1, "finite": True}, {"fault": "e", "traceback": True, "differ": []}]
    (tmp_path / "faults.jsonl").write_text("".join(json.dumps(common | line) + "\n" for line in lines))
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    _, _, *found = [row for row in report_kills.faults().splitlines() if row.startswith("|")]
    assert found == [
        "| X1, a | 1 | one sentence | 2, 1 torn passed over | yes, bit by bit |",
        "| X1, b | 1 | one sentence | 2, 1 torn passed over | no: losses |",
        "| X1, c | 1 | one sentence | 2 | exit code 2 |",
        "| X1, d | 1 | a warning |  | 1 step skipped, adapters finite |",
        "| X1, e | 1 | a traceback | 2, 1 torn passed over | yes, bit by bit |",
    ]
