"""The generated word problems: right arithmetic, reproducible, with splits that share no question."""

import re
from collections import Counter

import pytest

from hyclora.utils.data.pretrain_text import KINDS, pretrain_documents
from hyclora.utils.data.word_problems import LARGEST_RESULT, OPERATORS, TEMPLATES, is_held_out, word_problems

ANNOTATION = re.compile(r"(\d+)([-+*/])(\d+) = <<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")


@pytest.fixture(scope="module")
def problems():
    return word_problems(3000, seed=0)


def pattern(question: str) -> re.Pattern:
    """A template's question as a pattern in which every slot is one word or number."""
    return re.compile(re.sub(r"\\\{\w+\\\}", r"\\w+", re.escape(question)))


def test_every_line_of_reasoning_calculates_correctly(problems):
    for problem in problems:
        *reasoning, _ = problem["answer"].split("\n")
        assert len(reasoning) in (2, 3)
        for line in reasoning:
            left, sign, right, *annotated, result, repeated = ANNOTATION.search(line).groups()
            assert annotated == [left, sign, right]
            assert OPERATORS[sign](int(left), int(right)) == int(result)
            assert repeated == result
            assert 0 < int(result) <= LARGEST_RESULT


def test_last_line_is_the_last_annotated_result(problems):
    for problem in problems:
        *_, last_step, final = problem["answer"].split("\n")
        assert final == f"#### {ANNOTATION.search(last_step).group(7)}"


def test_operands_come_from_the_question_or_from_earlier_steps(problems):
    for problem in problems:
        known = {*re.findall(r"\d+", problem["question"])} | ({"2"} if "half of them" in problem["question"] else set())
        for left, _, right, *_, result, _ in ANNOTATION.findall(problem["answer"]):
            assert {left, right} <= known
            known.add(result)


def test_no_slot_is_left_open_and_no_question_repeats(problems):
    assert not any(re.search(r"[{}]", problem["question"] + problem["answer"]) for problem in problems)
    assert len({problem["question"] for problem in problems}) == len(problems)


def test_every_template_occurs(problems):
    patterns = {name: pattern(template.question) for name, template in TEMPLATES.items()}
    counts = Counter()
    for problem in problems:
        names = [name for name, shape in patterns.items() if shape.fullmatch(problem["question"])]
        assert len(names) == 1
        counts.update(names)
    assert counts.keys() == TEMPLATES.keys()
    assert min(counts.values()) > len(problems) / len(TEMPLATES) / 2


def test_the_answer_cannot_be_guessed(problems):
    results = Counter(problem["answer"].rsplit("#### ", 1)[1] for problem in problems)
    assert max(results.values()) < 0.04 * len(problems)


def test_deterministic_for_a_seed():
    assert word_problems(50, seed=3) == word_problems(50, seed=3)
    assert word_problems(50, seed=3) == word_problems(80, seed=3)[:50]
    assert word_problems(50, seed=3) != word_problems(50, seed=4)


def test_splits_share_no_question():
    splits = {name: {p["question"] for p in word_problems(400, seed=1, split=name)} for name in ("train", "test")}
    assert all(len(questions) == 400 for questions in splits.values())
    assert splits["train"].isdisjoint(splits["test"])
    assert all(is_held_out(question) for question in splits["test"])
    assert not any(is_held_out(question) for question in splits["train"])


def test_pretraining_text_neither_shows_the_format_of_fine_tuning_nor_held_out_questions():
    documents = pretrain_documents(3000, seed=0)
    assert documents == pretrain_documents(3000, seed=0)
    text = "\n".join(documents)
    for phrase in ("####", "final answer", "Answer the above question", "think step by step"):
        assert phrase.lower() not in text.lower()
    held_out = [problem["question"] for problem in word_problems(3000, seed=0, split="test")]
    assert not any(question in text for question in held_out)
    assert len(KINDS) == 4 and sum("<<" in document for document in documents) > 1000
