"""Arithmetic word problems of several data sets: what is trained on, and the sets that it is judged by.

The files are LLM-Adapters' (Hu et al., 2023), GSM8K's or MAWPS's own; which of them is told by the keys of a row:

    keys                                      what is learned                        what is compared
    instruction, input, output, answer        output                                 answer
    question, answer                          answer ("... #### 8")                  the number behind ####
    original_text, equation, ans              equation, then ans                     ans

Answers are numbers, or letters of the question's options (AQuA). `output` is a text that a model wrote, missing in some
rows and wrong in others: it is learned where there is one, and never compared with.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hyclora.utils.answers import extract_number, options_of, stem_of
from hyclora.utils.data.files import listed, read_each, text_of
from hyclora.utils.data.gsm8k import FINAL_ANSWER, target_of
from hyclora.utils.data.tokens import Example
from hyclora.utils.data.word_problems import word_problems
from hyclora.utils.errors import UserError

DEMO_SEED = 0
DEMO_SETS = {  # of generated problems, by their solution
    "two_steps": lambda solution: solution.count("\n") == 2,
    "three_steps": lambda solution: solution.count("\n") == 3,
    "division": lambda solution: "/" in solution,
}
# Stanford Alpaca's prompt, which Math10K is trained with.
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)


@dataclass
class ProblemSet:
    """Rows {"question", "answer"} that a model is tested by, and how many of their questions it was trained on."""

    name: str
    rows: list[dict]
    seen: int = 0

    def __str__(self) -> str:
        different = len({fingerprint(row["question"]) for row in self.rows})
        repeats = "" if different == len(self.rows) else f", {different} different questions"
        return f"{self.name}: {len(self.rows)} test rows{repeats}"


@dataclass
class Problems:
    """Rows {"question", "response"} to train on, and test sets.

    empty: rows that were left out as they have no response. dropped: as their question is one of a test set.
    """

    training: list[dict]
    tests: list[ProblemSet]
    empty: int = 0
    dropped: int = 0

    def prepared(self, drop_seen: bool, train_limit: int | None, test_limit: int | None) -> "Problems":
        """With the first rows only of each, and the test questions that are trained on dropped there, or counted.

        They are dropped whether the first test rows have them or later ones: the training is the same either way.
        """
        training = self.training
        if drop_seen:
            tested = {fingerprint(row["question"]) for test in self.tests for row in test.rows}
            training = [row for row in training if fingerprint(row["question"]) not in tested]
            if not training:
                raise UserError(f"drop_seen leaves none of the {len(self.training)} training rows: train on others")
        dropped = len(self.training) - len(training)
        training = training[:train_limit]
        trained = {fingerprint(row["question"]) for row in training}
        tests = [ProblemSet(test.name, test.rows[:test_limit]) for test in self.tests]
        for test in tests:
            test.seen = sum(fingerprint(row["question"]) in trained for row in test.rows)
        return Problems(training, tests, self.empty, dropped)

    def examples(self) -> list[Example]:
        """The training rows as a model learns them."""
        return [Example([(prompt_of(row["question"]), row["response"])]) for row in self.training]

    def remarks(self) -> dict[str, str]:
        """What must be read with the accuracy of a test set, and with their mean, where training has seen questions."""
        seen = {test.name: f" ({test.seen} of {len(test.rows)} trained on)" for test in self.tests if test.seen}
        return seen | ({"mean": " (with questions trained on)"} if seen else {})

    def __str__(self) -> str:
        lines = [f"{self.empty} rows left out, as they have no response"] if self.empty else []
        lines += [f"{self.dropped} rows left out, as their question is in a test set"] if self.dropped else []
        lines += map(str, self.tests)
        remarks = [f"{name}{remark}" for name, remark in self.remarks().items() if name != "mean"]
        lines += [f"WARNING: {test}: its accuracy says nothing of new questions" for test in remarks]
        lines += ["WARNING: --drop_seen True leaves those rows out of training"] if remarks else []
        return "\n".join(lines)


def prompt_of(question: str) -> str:
    return PROMPT.format(question)


def fingerprint(question: str) -> str:
    """The letters and digits of a question without its options.

    The same questions are spelled in several ways: didn't and did n't, 3,884 and 3884.
    """
    return "".join(filter(str.isalnum, stem_of(question).casefold()))


def number_text(value, key: str, place: str) -> str:
    """A number as text, whichever of the two a file has; 8.0 is "8"."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UserError(f'{place}: the value of "{key}" is neither a number nor a text but {json.dumps(value)[:40]}')
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f'{place}: the value of "{key}" is {value}: write a number')
    if isinstance(value, float) and value == int(value):
        value = int(value)
    return str(value).strip()


def final_of(answer: str) -> str:
    """What stands behind GSM8K's ####, or all of it."""
    return answer.rpartition("####")[2].strip()


def _instruction(row: dict, place: str) -> str:
    more = row.get("input")
    return text_of(row, "instruction", place) + (f"\n{text_of(row, 'input', place)}" if more else "")


def _equation(row: dict, place: str) -> str:
    return f"{text_of(row, 'equation', place)}\n{FINAL_ANSWER}{number_text(row.get('ans'), 'ans', place)}"


def _text(key: str) -> Callable[[dict, str], str]:
    return lambda row, place: text_of(row, key, place)


@dataclass(frozen=True)
class _Format:
    """question, response: give these texts of (row, place). answer: the key of what is compared."""

    question: Callable[[dict, str], str]
    response: Callable[[dict, str], str]
    answer: str


FORMATS = {
    "instruction": _Format(_instruction, _text("output"), "answer"),
    "question": _Format(_text("question"), _text("answer"), "answer"),
    "original_text": _Format(_text("original_text"), _equation, "ans"),
}


def _format_of(row: dict, place: str) -> _Format:
    key = next((key for key in FORMATS if key in row), None)
    if key is None:
        raise UserError(f"{place}: a row needs the key {', or '.join(FORMATS)}, found {listed(row)}")
    return FORMATS[key]


def _question(row: dict, place: str) -> str:
    question = _format_of(row, place).question(row, place)
    if not fingerprint(question):
        raise UserError(f"{place}: the question is empty: write or remove it")
    return question


def read_training(file: Path) -> tuple[list[dict], int]:
    """Rows {"question", "response"} to train on, and the number of rows left out as they have no response."""
    if not file.is_file():
        raise UserError(f"training file {file} does not exist: name a .json or .jsonl file with --train_file")

    def read(place: str, row: dict) -> dict:
        response = _format_of(row, place).response(row, place)
        return {"question": _question(row, place), "response": target_of(response).strip()}

    rows = read_each(file, read)
    kept = [row for row in rows if row["response"]]
    if not kept:
        raise UserError(f"{file}: none of its {len(rows)} rows has a response to learn: name another --train_file")
    return kept, len(rows) - len(kept)


def read_test(folder: Path, name: str) -> ProblemSet:
    """The set `folder`/`name`/test.json (or test.jsonl)."""
    files = [file for suffix in ("json", "jsonl") for file in folder.glob(f"*/test.{suffix}") if file.is_file()]
    found = sorted({file.parent.name for file in files})
    if not found:
        raise UserError(
            f"data_dir {folder} has no NAME/test.json of a test set: fetch them with download_datasets.sh, "
            "or name their folder"
        )
    if name not in found:
        raise UserError(f"unknown test set {name}: {folder} has {', '.join(found)}")
    file = next(file for file in files if file.parent.name == name)
    return ProblemSet(name, read_each(file, _read_tested))


def _read_tested(place: str, row: dict) -> dict:
    question, key = _question(row, place), _format_of(row, place).answer
    if key not in row:
        raise UserError(f'{place}: the key "{key}" is missing, found {listed(row)}')
    answer, options = final_of(number_text(row[key], key, place)), options_of(question)
    if options and answer not in options:
        raise UserError(f'{place}: the answer "{answer}" is not one of its options {", ".join(options)}')
    if not options and extract_number(answer) is None:
        raise UserError(f'{place}: the answer "{answer}" has no number, and the question no options')
    return {"question": question, "answer": answer}


def read(training: Path, folder: Path, names: list[str]) -> Problems:
    """The rows of a training file, and the test sets of these names in a folder; UserError for a mistake in them."""
    tests = [read_test(folder, name) for name in names]
    rows, empty = read_training(training)
    return Problems(rows, tests, empty)


def demo(count: int, names: list[str], tested: int) -> Problems:
    """The same of generated problems: `count` to train on, `tested` in each test set."""
    tests = [demo_test(name, tested) for name in names]
    rows = word_problems(count, DEMO_SEED)
    return Problems([{"question": row["question"], "response": target_of(row["answer"])} for row in rows], tests)


def demo_test(name: str, count: int) -> ProblemSet:
    """`count` generated problems of a kind of DEMO_SETS; their questions are held out of the training."""
    if name not in DEMO_SETS:
        raise UserError(f"unknown test set {name}: the demo has {', '.join(DEMO_SETS)}")
    drawn = word_problems(4 * count + 20, DEMO_SEED, split="test")
    rows = [row | {"answer": final_of(row["answer"])} for row in drawn if DEMO_SETS[name](row["answer"])]
    return ProblemSet(name, rows[:count])
