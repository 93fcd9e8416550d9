"""Arithmetic word problems in the format of GSM8K, generated from a seed.

A problem is a story template with people, things and small numbers filled in, solved in two or three steps.
Whether a problem is held out is a property of its question: the CRC-32 of the text decides, so that problems
drawn with any seed and count for one split never meet those of the other.
"""

import operator
import random
import zlib
from dataclasses import dataclass

from hyclora.utils.errors import UserError

MOST = 100_000  # that are asked for at once: different questions end somewhere, and would be looked for without end
HELD_OUT_SHARE = 8  # one question in eight is held out
SMALLEST_RESULT, LARGEST_RESULT = 2, 199

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}

PRONOUNS = {
    **dict.fromkeys(("Mia", "Emma", "Lily", "Sara", "Nina", "Ruth", "Clara", "Hannah", "Julia", "Grace"), "she"),
    **dict.fromkeys(("Tom", "Ben", "Max", "Leo", "Sam", "Oscar", "Peter", "David", "Henry", "Jack"), "he"),
}
THINGS = ("apples", "pencils", "stickers", "marbles", "cookies", "shells", "cards", "buttons", "stamps", "flowers")
CONTAINERS = {"box": "boxes", "bag": "bags", "basket": "baskets", "jar": "jars", "tray": "trays"}
GOODS = {"pen": "pens", "book": "books", "kite": "kites", "scarf": "scarves", "lamp": "lamps", "cup": "cups"}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True)
class Template:
    """A story with the ranges of its given numbers and the steps (result, expression, sentence) of its solution."""

    question: str
    numbers: dict[str, tuple[int, int]]
    steps: tuple[tuple[str, str, str], ...]


TEMPLATES = {
    "buy_and_give": Template(
        "{name} has {a} {things}. {He} buys {b} more and then gives {c} to {friend}. "
        "How many {things} does {name} have now?",
        {"a": (5, 50), "b": (5, 50), "c": (3, 40)},
        (
            ("x", "a + b", "After buying more, {name} has {calc} {things}."),
            ("y", "x - c", "After giving some to {friend}, {he} has {calc} {things}."),
        ),
    ),
    "pick_and_share": Template(
        "{name} gets {a} {things} in the morning and {b} in the afternoon. "
        "{He} shares them equally among {k} friends. How many {things} does each friend get?",
        {"a": (5, 50), "b": (5, 50), "k": (2, 6)},
        (
            ("x", "a + b", "{name} gets {calc} {things} in all."),
            ("y", "x / k", "Each friend gets {calc} {things}."),
        ),
    ),
    "containers": Template(
        "{name} has {k} {boxes} with {a} {things} in each {box}. {He} gives {b} {things} to {friend}. "
        "How many {things} are left?",
        {"k": (2, 6), "a": (5, 30), "b": (3, 50)},
        (
            ("x", "k * a", "The {boxes} hold {calc} {things}."),
            ("y", "x - b", "After giving some to {friend}, {calc} {things} are left."),
        ),
    ),
    "change": Template(
        "{name} has ${a}. {He} buys {k} {items} for ${b} each. How many dollars does {he} have left?",
        {"a": (30, 99), "k": (2, 6), "b": (3, 25)},
        (
            ("x", "k * b", "The {items} cost {calc} dollars."),
            ("y", "a - x", "{name} has {calc} dollars left."),
        ),
    ),
    "two_days": Template(
        "{name} sold {a} {things} on {day} and {k} times as many on {later}. "
        "How many {things} did {name} sell altogether?",
        {"a": (5, 40), "k": (2, 4)},
        (
            ("x", "k * a", "On {later}, {name} sold {calc} {things}."),
            ("y", "a + x", "Altogether, {he} sold {calc} {things}."),
        ),
    ),
    "two_goods": Template(
        "{name} buys {k} {items} for ${a} each and {m} {others} for ${b} each. How many dollars does {he} pay?",
        {"k": (2, 5), "a": (3, 20), "m": (2, 5), "b": (3, 20)},
        (
            ("x", "k * a", "The {items} cost {calc} dollars."),
            ("y", "m * b", "The {others} cost {calc} dollars."),
            ("z", "x + y", "{name} pays {calc} dollars."),
        ),
    ),
    "pool_and_pack": Template(
        "{name} has {a} {things} and {friend} has {b} more than {name}. They put all of them equally into {k} {boxes}. "
        "How many {things} are in each {box}?",
        {"a": (5, 50), "b": (2, 30), "k": (2, 6)},
        (
            ("x", "a + b", "{friend} has {calc} {things}."),
            ("y", "a + x", "Together they have {calc} {things}."),
            ("z", "y / k", "Each {box} has {calc} {things}."),
        ),
    ),
    "comparison": Template(
        "{name} has {a} {things} and {friend} has {k} times as many. {friend} then loses {b} {things}. "
        "How many more {things} than {name} does {friend} have now?",
        {"a": (5, 30), "k": (3, 6), "b": (2, 30)},
        (
            ("x", "k * a", "At first {friend} has {calc} {things}."),
            ("y", "x - b", "After losing some, {friend} has {calc} {things}."),
            ("z", "y - a", "That is {calc} {things} more than {name}."),
        ),
    ),
    "bus": Template(
        "A bus starts with {a} people on {day}. At the first stop {b} people get off and {c} people get on. "
        "At the second stop {d} people get on. How many people are on the bus now?",
        {"a": (15, 60), "b": (3, 40), "c": (3, 30), "d": (3, 30)},
        (
            ("x", "a - b", "After some get off, there are {calc} people."),
            ("y", "x + c", "After the first stop, there are {calc} people."),
            ("z", "y + d", "After the second stop, there are {calc} people."),
        ),
    ),
    "half": Template(
        "{name} had {a} {things}. {He} gave half of them to {friend} and then found {b} more. "
        "How many {things} does {name} have now?",
        {"a": (10, 90), "b": (5, 50)},
        (
            ("x", "a / 2", "After giving half to {friend}, {name} had {calc} {things}."),
            ("y", "x + b", "After finding more, {he} has {calc} {things}."),
        ),
    ),
}


def cast(rng: random.Random) -> dict[str, str]:
    """The people, things, goods, containers and days of one story, by the slot they fill."""
    name, friend = rng.sample(sorted(PRONOUNS), 2)
    box, (item, other), day = rng.choice(list(CONTAINERS)), rng.sample(list(GOODS), 2), rng.randrange(len(DAYS))
    return {
        "name": name,
        "friend": friend,
        "he": PRONOUNS[name],
        "He": PRONOUNS[name].capitalize(),
        "things": rng.choice(THINGS),
        "box": box,
        "boxes": CONTAINERS[box],
        "item": item,
        "items": GOODS[item],
        "other": other,
        "others": GOODS[other],
        "day": DAYS[day],
        "later": DAYS[(day + 1) % len(DAYS)],
    }


def solve(template: Template, rng: random.Random) -> tuple[dict[str, int], list[str]]:
    """Draw numbers until every step comes to a whole number in range; give them and the calculation of each step."""
    while True:
        numbers = {slot: rng.randint(low, high) for slot, (low, high) in template.numbers.items()}
        calculations = []
        for slot, expression, _ in template.steps:
            left, sign, right = (str(numbers.get(token, token)) for token in expression.split())
            result = OPERATORS[sign](int(left), int(right))
            if not (SMALLEST_RESULT <= result <= LARGEST_RESULT and result == int(result)):
                break
            numbers[slot] = int(result)
            calculation = f"{left}{sign}{right}"
            calculations.append(f"{calculation} = <<{calculation}={numbers[slot]}>>{numbers[slot]}")
        else:
            return numbers, calculations


def word_problem(rng: random.Random) -> dict[str, str]:
    """One problem: its question, and its answer as annotated reasoning lines above the line `#### result`."""
    template = rng.choice(list(TEMPLATES.values()))
    slots = cast(rng)
    numbers, calculations = solve(template, rng)
    reasoning = [
        sentence.format(**slots, calc=calculation)
        for (_, _, sentence), calculation in zip(template.steps, calculations, strict=True)
    ]
    answer = "\n".join([*reasoning, f"#### {numbers[template.steps[-1][0]]}"])
    return {"question": template.question.format(**slots, **numbers), "answer": answer}


def is_held_out(question: str) -> bool:
    """Whether the question belongs to the held-out split."""
    return zlib.crc32(question.encode()) % HELD_OUT_SHARE == 0


def word_problems(n: int, seed: int, split: str = "train") -> list[dict[str, str]]:
    """`n` problems with different questions of the split "train" or "test", the same for the same arguments."""
    if n > MOST:
        raise UserError(
            f"there are at most {MOST} generated problems, and {n} are asked for: lower max_train_samples or "
            "max_eval_samples, or give rows of your own"
        )
    rng = random.Random(seed)
    problems = {}
    while len(problems) < n:
        problem = word_problem(rng)
        if is_held_out(problem["question"]) == (split == "test"):
            problems.setdefault(problem["question"], problem)
    return list(problems.values())
