"""Sentences in the form of GLUE's SST-2, generated from a seed: what somebody thinks of something that was bought.

A review is good if its word of praise or blame is one of praise, and the other way round where there is a "not"; so one
word alone does not tell. As with the word problems, the text decides whether a review is held out.
"""

import random

from hyclora.utils.data.word_problems import cast, is_held_out

PRAISE = ("good", "happy", "sunny", "warm", "new", "bright")
BLAME = ("bad", "sad", "cold", "old", "late", "broken")
SENTENCES = (
    "{name} said that the {item} was {opinion}.",
    "On {day} {friend} gave {name} a {item}, and it was {opinion}.",
    "The {item} next to the {box} was {opinion}, said {friend}.",
    "{name} and {friend} talked about the {item}. It was {opinion}.",
)


def _review(rng: random.Random) -> tuple[str, bool]:
    praises, negated = rng.random() < 0.5, rng.random() < 0.3
    opinion = "not " * negated + rng.choice(PRAISE if praises else BLAME)
    return rng.choice(SENTENCES).format(**cast(rng), opinion=opinion), praises != negated


def reviews(n: int, split: str, seed: int) -> list[tuple[str, bool]]:
    """`n` different reviews, each with whether it is good; split: "train", or else the held-out ones."""
    rng = random.Random(seed)
    found: dict[str, bool] = {}
    while len(found) < n:
        text, good = _review(rng)
        if is_held_out(text) == (split != "train"):
            found.setdefault(text, good)
    return list(found.items())
