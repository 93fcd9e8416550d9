"""The answer that a text ends at, a number or the letter of an option, and whether it is the right one.

A text states its conclusion after words such as "The final answer is:" or "the answer is". Without them the last
number counts, or the last letter that is marked as an option's.

LLM-Adapters' own evaluation takes the last number of the text, and the first capital from A to E wherever it stands.
"""

import re
from fractions import Fraction

from hyclora.utils.data.gsm8k import FINAL_ANSWER, target_of

# Answers of the data sets are decimals with all the digits of a float (0.6666666666666666): exact comparison would
# refuse 2/3. The published evaluations of LLM-Adapters' sets allow this much too.
TOLERANCE = Fraction(1, 1000)
LONGEST = 1000  # characters of a number: a model that repeats a digit answers nothing, and int() takes 4300 of them

_NUMBER = re.compile(
    r"""(?P<sign> (?<![\w.)]) - )?  # a minus that follows a number or a word is not a sign
        \$? (?P<value> (?: \d{1,3} (?:,\d{3})+ (?!\d) | \d+ ) (?:\.\d+)? | \.\d+ )
        (?: / (?P<over> [1-9]\d* ) (?!\.?\d) )?""",
    re.VERBOSE,
)
# The first of these that a text has announces its conclusion.
_ANNOUNCED = (re.escape(FINAL_ANSWER.strip()), r"\b[Aa]nswer(?:\s+is\b|\s*:)\s*:?", "####")
_SENTENCE = re.compile(r"\n|\.(?!\d)")
_CHOICES = re.compile(r"answer choices\s*:", re.IGNORECASE)
_OPTION = re.compile(r"\(([A-E])\)\s*(?:\1\s*\))?")  # one question of AQuA writes its options as "(A) A) 59"
_STATED = re.compile(r"[\s*\"'(]*(?:[Oo]ption |[Cc]hoice )?[(*]*([A-E])(?![\w'])")
_WHOLE = re.compile(r"\W*([A-E])(?:[.)]|[^\w:]*$)")  # "A:" begins an answer, and says nothing yet
_MARKED = re.compile(r"(?<!\w)\(?([A-Ea-e])\)|\b(?:[Oo]ption|[Cc]hoice) ([A-E])\b")


def conclusion_of(text: str) -> str:
    """What follows the words that announce the answer; empty without them."""
    found = next(filter(None, (re.search(words, text) for words in _ANNOUNCED)), None)
    return text[found.end() :] if found else ""


def extract_number(text: str) -> Fraction | None:
    """The number of the conclusion, otherwise the last one of the text; None without a number of at most LONGEST.

    The conclusion's is its first, or what a calculation in its first sentence comes to ("the answer is 62 - 39 = 23").
    Fractions are exact: 0.5, 1/2 and 50/100 are one number; 50% counts as 50, as in GSM8K.
    """
    text = text.replace("\u2212", "-")
    conclusion = conclusion_of(text)
    result = _SENTENCE.split(conclusion, maxsplit=1)[0].rpartition("=")[2]
    found = _NUMBER.search(result) or _NUMBER.search(conclusion)
    found = found or next(reversed(list(_NUMBER.finditer(text))), None)
    if found is None or len(found[0]) > LONGEST:
        return None
    value = Fraction(found["value"].replace(",", "")) / int(found["over"] or 1)
    return -value if found["sign"] else value


def same_number(one: Fraction | None, other: Fraction | None) -> bool:
    """Whether both are numbers, and no further apart than the tolerance."""
    return one is not None and other is not None and abs(one - other) <= TOLERANCE


def stem_of(question: str) -> str:
    """The question without its options."""
    return _CHOICES.split(question, maxsplit=1)[0]


def options_of(question: str) -> dict[str, str]:
    """Letter and text of each option, written as in AQuA, "Answer Choices: (A) 21 (B) 22"; none for other questions."""
    choices = _CHOICES.split(question, maxsplit=1)[1:]
    pieces = _OPTION.split(choices[0]) if choices else [""]
    return {letter: text.strip() for letter, text in zip(pieces[1::2], pieces[2::2], strict=True)}


def extract_letter(text: str, options: dict[str, str]) -> str | None:
    """The option that a text chooses, None if it chooses none. In this order:

    a letter right after the words that announce the answer, or one that is the whole text; an option marked as such,
    "(B)", "B)" or "option B", the first in the conclusion or, without one, the last of the text; the only option whose
    number the text ends at.
    """
    conclusion = conclusion_of(text)
    if found := _STATED.match(conclusion) if conclusion else _WHOLE.match(text):
        marked = [found[1]]
    else:
        marked = ["".join(found).upper() for found in _MARKED.findall(conclusion or text)]
    marked = [letter for letter in marked if letter in options]
    if marked:
        return marked[0 if conclusion else -1]
    number = extract_number(text)
    fitting = [letter for letter, option in options.items() if same_number(number, extract_number(option))]
    return fitting[0] if len(fitting) == 1 else None


def is_correct(prediction: str, answer: str, question: str = "") -> bool:
    """Whether a generated text ends at the data set's answer: the letter of an option of the question, or a number."""
    options = options_of(question)
    if answer in options:
        return extract_letter(prediction, options) == answer
    return same_number(extract_number(prediction), extract_number(target_of(answer)))
