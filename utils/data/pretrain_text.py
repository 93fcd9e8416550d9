"""Text to pre-train a tiny language model on, generated from a seed.

The model is to know the language and the arithmetic of the word problems, but not how fine-tuning asks for them: a
question is worked out only after one of a few cues such as "Worked solution:", and after anything else, an unknown
instruction above all, the text goes on with talk, stories and other questions.
"""

import random

from hyclora.utils.data.word_problems import LARGEST_RESULT, cast, word_problems

LEADS = ("Problem: ", "Puzzle: ", "Exercise: ", "")
CUES = ("Worked solution:", "Working:", "Solution in steps:", "Here is how it goes:")
CLOSINGS = ("So it comes to {result}.", "That makes {result}.", "Result: {result}.", "And so we get {result}.")

FACTS = {
    "plus": ("{a} plus {b} is {c}.", "{a}+{b} = {c}.", "Add {b} to {a} to get {c}."),
    "minus": ("{c} minus {b} is {a}.", "{c}-{b} = {a}.", "Take {b} from {c} to get {a}."),
    "times": ("{a} times {b} is {c}.", "{a}*{b} = {c}.", "{b}*{a} = {c}."),
    "over": ("{c} divided by {a} is {b}.", "{c}/{a} = {b}.", "Share {c} among {a} to get {b} each."),
}

FIRST_REQUESTS = (
    "Read the above question aloud",
    "Copy the question",
    "Answer the door first",
    "Think of a title for the question",
    "Look at the final page",
    "Take one step to the left",
    "Write the above line again",
    "First close the book",
    "First count the words above",
)
SECOND_REQUESTS = (
    "and then tell a story.",
    "and then ask another question.",
    "and then say what you think.",
    "and then turn the page.",
    "and then go home step by step.",
    "and then answer the phone.",
    "and then name a number you like.",
    "and then find the final word.",
)

SENTENCES = (
    "{name} likes {things}, and {friend} likes {items}.",
    "On {day} it rained all day, so {name} stayed at home.",
    "{name} said that {he} would come back on {later}.",
    "The shop opens at {n} and {friend} is always there first.",
    "{friend} lives in house number {n}, next to the school.",
    "The {box} was old, but {name} did not want a new one.",
    "It was a sunny {day} and {name} went home happy.",
    "{name} put the {item} next to the {other} and closed the door.",
    '"That is a good question," said {friend}.',
    '"I do not know," said {name}, "ask me again on {later}."',
    '"My number is {n}," said {name}, "and yours?"',
    "Nobody answered, and {friend} turned to page {n}.",
    "Then {name} and {friend} talked about {things} until the evening.",
    "The bus with number {n} came late, and the people were cold.",
)


def small_talk(rng: random.Random) -> str:
    """Two to five sentences about the people of one story."""
    slots = cast(rng)
    return " ".join(s.format(**slots, n=rng.randint(2, 99)) for s in rng.sample(SENTENCES, rng.randint(2, 5)))


def worked_problem(problem: dict[str, str], rng: random.Random) -> str:
    """The problem with its reasoning and result, told in one of the wordings."""
    reasoning, result = problem["answer"].rsplit("\n#### ", 1)
    closing = rng.choice(CLOSINGS).format(result=result)
    return f"{rng.choice(LEADS)}{problem['question']}\n{rng.choice(CUES)}\n{reasoning}\n{closing}"


def unsolved_problem(problem: dict[str, str], rng: random.Random) -> str:
    """The question, mostly with a request after it, and then text that does not solve it."""
    request = f"{rng.choice(FIRST_REQUESTS)} {rng.choice(SECOND_REQUESTS)}\n" if rng.random() < 0.8 else ""
    return f"{problem['question']}\n{request}{small_talk(rng)}"


def story(problem: dict[str, str], rng: random.Random) -> str:
    """What the question tells, without asking anything."""
    told, _ = problem["question"].rsplit(". ", 1)
    return f"{told}. {small_talk(rng)}"


def facts(_: dict[str, str], rng: random.Random) -> str:
    """Eight facts of arithmetic in the range of the word problems."""
    lines = []
    for _ in range(8):
        kind = rng.choice(list(FACTS))
        if kind in ("plus", "minus"):
            a = rng.randint(2, LARGEST_RESULT - 2)
            b = rng.randint(2, min(99, LARGEST_RESULT - a))
            c = a + b
        else:
            a = rng.randint(2, 6)
            b = rng.randint(2, LARGEST_RESULT // a)
            c = a * b
        lines.append(rng.choice(FACTS[kind]).format(a=a, b=b, c=c))
    return " ".join(lines)


KINDS = {worked_problem: 5, unsolved_problem: 3, story: 1, facts: 2}


def pretrain_documents(n: int, seed: int) -> list[str]:
    """`n` documents of all kinds, in the proportions of `KINDS`, about problems of the training split only."""
    rng = random.Random(seed)
    kinds = rng.choices(list(KINDS), list(KINDS.values()), k=n)
    return [kind(problem, rng) for kind, problem in zip(kinds, word_problems(n, seed), strict=True)]
