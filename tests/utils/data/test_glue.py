"""GLUE's files as they are: what a usual reader of tables makes of them, and mistakes in them."""

import csv
import io
import sys
from types import SimpleNamespace

import pytest

from hyclora.utils.data.glue import GLUE, described, load_rows, read_tsv
from hyclora.utils.errors import UserError

BYTE_ORDER_MARK = "\ufeff"
HEADERS = {
    "cola": None,
    "mrpc": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "stsb": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
    "sst2": "sentence\tlabel",
    "qnli": "index\tquestion\tsentence\tlabel",
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label"
    ),
    "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "rte": "index\tsentence1\tsentence2\tlabel",
    "wnli": "index\tsentence1\tsentence2\tlabel",
}


def write(folder, name, *lines, split="dev", header=True, end="\n"):
    """The lines as a file of a task, below its header if it has one."""
    file = folder / GLUE[name].folder / f"{split}.tsv"
    file.parent.mkdir(parents=True, exist_ok=True)
    top = [HEADERS[name]] if header and HEADERS[name] else []
    file.write_bytes(end.join([*top, *lines, ""]).encode())
    return file


def line_of(name, *texts, label):
    """A line of a task's file, its other columns filled."""
    columns = (HEADERS[name] or "\t".join(GLUE[name].columns)).split("\t")
    cells = dict(zip((*GLUE[name].texts, GLUE[name].label), (*texts, label), strict=True))
    return "\t".join(cells.get(column, "-") for column in columns)


@pytest.mark.parametrize("name", HEADERS)
def test_the_columns_of_every_task_are_found(name, tmp_path):
    task = GLUE[name]
    texts = ["One text.", "Another."][: len(task.texts)]
    values = task.labels or ("3.8", "0.0")
    file = write(tmp_path, name, *(line_of(name, *texts, label=value) for value in values))
    numbers = range(len(values)) if task.labels else map(float, values)
    assert read_tsv(file, task) == [{"texts": texts, "label": number} for number in numbers]
    assert task.n_outputs == max(len(task.labels), 1)
    assert len(task.rows) == 1 + len(task.tests)


def test_quotes_are_letters(tmp_path):
    """With quotes as csv has them by default, one that never closes takes the rows behind it along."""
    lines = [
        line_of("mrpc", '" Sure , " he said .', 'He said " sure .', label="1"),
        line_of("mrpc", '"It opens here', "and there", label="0"),
        line_of("mrpc", "Plain .", 'It closes here"', label="1"),
    ]
    file = write(tmp_path, "mrpc", *lines)
    rows = read_tsv(file, GLUE["mrpc"])
    assert [row["label"] for row in rows] == [1, 0, 1]
    assert rows[0]["texts"] == ['" Sure , " he said .', 'He said " sure .']
    assert len(list(csv.reader(io.StringIO(file.read_text()), delimiter="\t"))) < 4
    literal = csv.reader(io.StringIO(file.read_text()), delimiter="\t", quoting=csv.QUOTE_NONE)
    assert [[cells[3], cells[4]] for cells in literal][1:] == [row["texts"] for row in rows]


def test_a_byte_order_mark_is_not_of_the_first_column(tmp_path):
    """As in the published dev file of MRPC, whose first column is the label."""
    file = write(tmp_path, "mrpc", line_of("mrpc", "a", "b", label="1"))
    file.write_text(BYTE_ORDER_MARK + file.read_text(), encoding="utf-8")
    assert read_tsv(file, GLUE["mrpc"]) == [{"texts": ["a", "b"], "label": 1}]


def test_cola_begins_with_a_row(tmp_path):
    file = write(tmp_path, "cola", "gj04\t1\t\tThey sang.", "gj04\t0\t*\tSang they the.")
    assert [row["label"] for row in read_tsv(file, GLUE["cola"])] == [1, 0]
    file = write(tmp_path, "cola", "source\tlabel\tmark\tsentence", "gj04\t1\t\tThey sang.")
    with pytest.raises(UserError, match='dev.tsv:1: the label "label" is not one of 0, 1'):
        read_tsv(file, GLUE["cola"])


def test_spellings_of_a_score_are_one_score(tmp_path):
    spelled = ["3.8", "3.80", "3.800", "5.000", "0", "0.00", "1.53333333333333"]
    file = write(tmp_path, "stsb", *(line_of("stsb", "a", "b", label=score) for score in spelled))
    assert [row["label"] for row in read_tsv(file, GLUE["stsb"])] == [3.8, 3.8, 3.8, 5, 0, 0, 1.53333333333333]


def test_other_line_ends_and_a_missing_last_one(tmp_path):
    lines = [line_of("sst2", "fine \u2028 film", label="1"), line_of("sst2", "dull", label="0")]
    file = write(tmp_path, "sst2", *lines, end="\r\n")
    expected = [{"texts": ["fine \u2028 film"], "label": 1}, {"texts": ["dull"], "label": 0}]
    assert read_tsv(file, GLUE["sst2"]) == expected
    file.write_bytes(file.read_bytes().rstrip())
    assert read_tsv(file, GLUE["sst2"]) == expected


@pytest.mark.parametrize(
    "name, lines, named",
    [
        ("rte", [], "dev.tsv is empty: it needs a row a line after the header"),
        ("cola", [], "dev.tsv is empty: it needs a row a line"),
        ("rte", [line_of("rte", "a", "b", label="neutral")], 'dev.tsv:2: the label "neutral" is not one of entail'),
        ("wnli", [line_of("wnli", "a", "b", label="")], 'dev.tsv:2: the label "" is not one of 0, 1'),
        ("stsb", [line_of("stsb", "a", "b", label="much")], 'dev.tsv:2: the score "much" is not a number from 0 to 5'),
        ("stsb", [line_of("stsb", "a", "b", label="nan")], 'dev.tsv:2: the score "nan" is not a number from 0 to 5'),
        ("stsb", [line_of("stsb", "a", "b", label="5.1")], 'dev.tsv:2: the score "5.1" is not a number from 0 to 5'),
        ("rte", ["0\ta\tb\tentailment", "1\ta\tb"], "dev.tsv:3: 3 cells, and 4 are expected"),
    ],
)
def test_mistakes_are_named(name, lines, named, tmp_path):
    with pytest.raises(UserError) as error:
        read_tsv(write(tmp_path, name, *lines), GLUE[name])
    assert str(error.value).startswith(str(tmp_path)) and named in str(error.value)


def test_a_missing_column_and_a_missing_file_are_named(tmp_path):
    file = write(tmp_path, "rte", "index\tsentence1\tlabel", "0\ta\tentailment", header=False)
    with pytest.raises(UserError, match='dev.tsv: the column "sentence2" is missing, found index, sentence1, label'):
        read_tsv(file, GLUE["rte"])
    with pytest.raises(UserError, match="RTE/train.tsv does not exist"):
        read_tsv(file.with_name("train.tsv"), GLUE["rte"])


def test_as_many_torn_rows_as_the_published_file_has_are_left_out(tmp_path):
    """Three rows of QQP's training file end before their label; the hub's copy is without them."""
    whole = line_of("qqp", "a", "b", label="1")
    file = write(tmp_path, "qqp", whole, *["7\t8\t9\thalf a"] * 3, whole)
    assert len(read_tsv(file, GLUE["qqp"])) == 2
    file = write(tmp_path, "qqp", whole, *["7\t8\t9\thalf a"] * 4, whole)
    with pytest.raises(UserError, match="dev.tsv:3: 4 cells, and 6 are expected"):
        read_tsv(file, GLUE["qqp"])


def arguments(name, folder="", **limits):
    limits = {"max_train_samples": None, "max_eval_samples": None} | limits
    return SimpleNamespace(data_name=name, data_dir=str(folder), **limits)


def test_both_dev_files_of_mnli_are_read(tmp_path):
    for split, label in (("train", "neutral"), ("dev_matched", "entailment"), ("dev_mismatched", "contradiction")):
        write(tmp_path, "mnli", *[line_of("mnli", "a", "b", label=label)] * 3, split=split)
    found = {split: load_rows(arguments("mnli", tmp_path, max_eval_samples=2), split) for split in GLUE["mnli"].tests}
    assert [[row["label"] for row in rows] for rows in found.values()] == [[0, 0], [2, 2]]
    assert len(load_rows(arguments("mnli", tmp_path), "train")) == 3


def test_what_was_read_is_told_beside_what_was_published_and_the_majority():
    rows = [{"texts": ["a", "b"], "label": int(i >= 40)} for i in range(71)]
    assert described(rows, GLUE["wnli"], "dev") == "dev: 71 rows, 56.3% of them 0"
    assert described(rows[:30], GLUE["wnli"], "dev") == "dev: 30 rows (of 71), 100.0% of them 0"
    scored = [{"texts": ["a", "b"], "label": 3.8}]
    assert described(scored, GLUE["stsb"], "train") == "train: 1 rows (of 5749)"


def test_the_hubs_names_of_splits_and_columns(monkeypatch):
    asked = []

    def load_dataset(*place, split):
        asked.append((*place, split))
        row = {"premise": "a", "hypothesis": "b", "sentence1": "a", "sentence2": "b", "label": 1}
        return SimpleNamespace(to_list=lambda: [row] * 2)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for name, split in (("mnli", "dev_matched"), ("mnli", "train"), ("mrpc", "dev")):
        assert load_rows(arguments(name), split) == [{"texts": ["a", "b"], "label": 1}] * 2
    places = [("mnli", "validation_matched"), ("mnli", "train"), ("mrpc", "validation")]
    assert asked == [("nyu-mll/glue", *place) for place in places]
