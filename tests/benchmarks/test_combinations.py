"""What people combine: each has tests, and what came of them is told as it is."""

import json

import pytest

from benchmarks import combinations, report_combinations
from benchmarks.combinations import COMBINATIONS, count, found
from benchmarks.report_combinations import cell
from hyclora.utils.args import ROOT

FUZZ = COMBINATIONS["mistyped input: options, data files and model folders"]


@pytest.mark.parametrize("test", [test for tests in COMBINATIONS.values() for test in tests])
def test_each_names_tests_that_there_are(test):
    file, _, name = test.partition("::")
    text = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert f"def {name}(" in text if name else "def test_" in text


@pytest.fixture
def cases(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.models.test_trl" name="test_a[one-two]"/>
        <testcase classname="tests.models.test_trl" name="test_b"><skipped/></testcase>
        <testcase classname="tests.models.test_trl" name="test_a[three]"><failure/><error/></testcase>
        <testcase classname="tests.models.test_trl_later" name="test_a"/>
        <testcase classname="tests.scripts.test_fuzz" name="test_c">
            <properties><property name="drawn" value="70"/></properties>
        </testcase>
        </testsuite></testsuites>"""
    )
    return found(report)


def test_cases_are_counted_where_they_belong(cases):
    file = count(cases, ("models/test_trl.py",))
    assert file == {"passed": 1, "skipped": 1, "failed": 1, "names": ["tests.models.test_trl::test_a[three]"]}
    assert count(cases, ("models/test_trl.py::test_a",)) == file | {"skipped": 0}
    assert count(cases, FUZZ) == {"passed": 1, "skipped": 0, "failed": 0, "names": [], "drawn": 70}


def test_cells(cases):
    assert cell(count(cases, ("models/test_trl.py",))) == "1 of 2 tests, 1 not for it"
    assert cell(count(cases, FUZZ)) == "1 of 1 tests, 70 inputs drawn" and cell(None) == ""


def test_a_failure_is_recorded_and_ends_with_code_1(cases, tmp_path, monkeypatch):
    monkeypatch.setattr(combinations, "run", lambda *_: None)
    monkeypatch.setattr(combinations, "found", lambda _: cases)
    with pytest.raises(SystemExit) as ended:
        combinations.main(["--match", "TRL", "--output_dir", str(tmp_path)])
    (line,) = (tmp_path / "combinations.jsonl").read_text().splitlines()
    assert ended.value.code == 1 and json.loads(line)["failed"] == 1
    monkeypatch.setattr("benchmarks.rows.RESULTS", tmp_path)
    (head, _, row), device = report_combinations.combinations().splitlines()[:3], json.loads(line)["device"]
    assert head == f"| what is combined | {device} |" and row.endswith("| 1 of 2 tests, 1 not for it |")


def test_jobs_are_a_number_from_1_on(cases, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(combinations, "run", lambda tests, jobs, report: asked.append(jobs))
    monkeypatch.setattr(combinations, "found", lambda _: cases)
    options = ["--match", "mistyped", "--output_dir", str(tmp_path), "--jobs"]
    combinations.main([*options, "3"])
    assert asked == [3]
    for wrong in ("0", "many"):
        with pytest.raises(SystemExit) as ended:
            combinations.main([*options, wrong])
        assert ended.value.code == 2 and f"{wrong} is not a whole number of at least 1" in capsys.readouterr().err


def test_a_name_that_there_is_not(capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        combinations.main(["--match", "DeepSpeed", "--output_dir", str(tmp_path)])
    assert ended.value.code == 2 and "--match 'DeepSpeed' is in no name" in capsys.readouterr().err
