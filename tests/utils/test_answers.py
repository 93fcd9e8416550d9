"""Reading what a text ends at, a number or a letter, and comparing it with the answer of a data set."""

from fractions import Fraction

import pytest

from hyclora.utils.answers import extract_letter, extract_number, is_correct, options_of, stem_of


@pytest.mark.parametrize(
    "text, number",
    [
        ("The final answer is: 1,234.50", "1234.5"),
        ("The final answer is: $18", "18"),
        ("The final answer is: 18.", "18"),
        ("The final answer is: -3", "-3"),
        ("The final answer is: -$3", "-3"),
        ("The final answer is: $-3", "-3"),
        ("The final answer is: \u22125 degrees", "-5"),
        ("The final answer is: 3/4", "0.75"),
        ("The final answer is: .5", "0.5"),
        ("The final answer is: 50%", "50"),
        ("2 + 3 = 5\nThe final answer is: 7 apples, not 9", "7"),
        ("He has 12 - 4 = 8 left", "8"),
        ("so 10-3", "3"),
        ("1, 2, 3", "3"),
        ("a total of 1,000,000 people", "1000000"),
        ("The final answer is: unknown, maybe 4", "4"),
        ("it is 6. The final answer is: none", "6"),
        ("7/0", "0"),
        ("The final answer is: -10", "-10"),
        ("The answer is 62 - 39 = 23.", "23"),
        ("So the answer is 2 + 2 = 4 apples. That is 1 more than 3.", "4"),
        ("So the answer is 5 arms and 3 legs.", "5"),
        ("The answer is x = y, which is 4", "4"),
        ("the answer is 1. The final answer is: 2", "2"),
        ("Answer: 1,234. Each of 5 has one.", "1234"),
        ("an answer is not given, so 8", "8"),
        ("4 * 2 = 8\n#### 8\nEach of the 5 has one.", "8"),
        ("no number", None),
        ("", None),
    ],
)
def test_extract_number(text, number):
    assert extract_number(text) == (None if number is None else Fraction(number))


def test_a_number_without_end_is_none():
    """As a model writes that repeats itself; int() refuses more than 4300 digits."""
    for text in ("9" * 5000, f"The final answer is: {'1' * 5000}", f"1/{'3' * 5000}", "." + "3" * 5000):
        assert extract_number(text) is None and not is_correct(text, "#### 1")
    assert extract_number("1" * 999) == int("1" * 999)


def test_numbers_compare_by_value():
    assert is_correct("The final answer is: 1,200.0", "6 * 200\n#### 1200")
    assert not is_correct("The final answer is: 1200.1", "#### 1,200")
    assert not is_correct("I do not know", "#### 0")
    assert is_correct("The answer is $17.", "17.0") and is_correct("It is -10.0", "-10")


@pytest.mark.parametrize("said", ["0.6666666666666666", "2/3", "0.667", ".6667"])
def test_a_float_with_all_its_digits_is_met_within_a_thousandth(said):
    assert is_correct(f"The answer is {said}.", "0.6666666666666666")
    assert not is_correct("The answer is 0.66.", "0.6666666666666666")
    assert is_correct("The answer is 8.001", "8.0") and not is_correct("The answer is 8.0011", "8.0")


QUESTION = "How far? Answer Choices: (A) 60 m (B) $1,023.65 (C) 2/3 (D) None of these (E) 60.5"
NESTED = "How old? Answer Choices: (A) A) 59 (B) B) 69 (C) C) 79 (D) D) 89 (E) E) 99"


def test_options_of_a_question():
    assert options_of(QUESTION) == dict(
        zip("ABCDE", ("60 m", "$1,023.65", "2/3", "None of these", "60.5"), strict=True)
    )
    assert options_of(NESTED) == dict(zip("ABCDE", ("59", "69", "79", "89", "99"), strict=True))
    assert options_of("What is (A) + (B)?") == {}
    assert stem_of(NESTED) == "How old? "


@pytest.mark.parametrize(
    "text, letter",
    [
        ("The answer is (D).", "D"),
        ("... so it is 60.The answer is B", "B"),
        ("The correct answer is option C: 2/3", "C"),
        ("The final answer is: **E**", "E"),
        ("Answer: D) None of these", "D"),
        ("The answer is 60.5, so (E).", "E"),
        ("The answer is C because A) is wrong", "C"),
        ("First (A) fails. Then (B) fails too, so it is (C)", "C"),
        ("I choose option D", "D"),
        ("B", "B"),
        (" (e). 60.5", "E"),
        ("C. 2/3", "C"),
        ("A train leaves. The final answer is: 1023.65", "B"),
        ("The answer is 60.", "A"),
        ("The final answer is: 0.6667", "C"),
        ("Boats and Dogs: 61", None),
        ("A: The rate is unknown.", None),
        ("A:", None),
        ("#### (C)\n#### (D)", "C"),
        ("The answer is F.", None),
        ("", None),
    ],
)
def test_extract_letter(text, letter):
    assert extract_letter(text, options_of(QUESTION)) == letter


def test_a_number_that_two_options_have_chooses_none():
    assert extract_letter("The answer is 5", {"A": "5 km", "B": "5 m"}) is None


def test_letters_are_compared_where_the_question_has_options():
    assert is_correct("The answer is (A) A) 59.", "A", NESTED) and is_correct("so 59", "A", NESTED)
    assert not is_correct("The answer is (B).", "A", NESTED)
    assert not is_correct("I do not know", "A", NESTED)
