"""What two reports on the assignment say: their tables of arrows, what they measured, and what they say in words.

The assignment is "Efficient Fine-tuning of LLM on a Single GPU": LLaMA-2 on 200 rows of Alpaca, batch 1, accumulation
over 8, LoRA of rank 16 on q and v, on an A100 with 40 GB. Numbers are as printed, MB and seconds.
"""

from dataclasses import dataclass

ABOUT = "Of a course's assignment on these techniques (LLaMA-2, 200 rows of Alpaca, an A100 of 40 GB), not of this run."
UP, DOWN, NONE = "up", "down", "none"
TECHNIQUES = ("gradient accumulation", "gradient checkpointing", "mixed precision", "LoRA")
MEMORY = ("parameters", "activations", "gradients", "optimizer state")
TIME = "run time"


@dataclass(frozen=True)
class Report:
    """arrows: by row, one of UP, DOWN, NONE a technique. measured: (MB, seconds) by the techniques that are on,
    None for what was not told or ran out of memory; what was not tried is left out.
    """

    name: str
    arrows: dict[str, tuple[str, str, str, str]]
    measured: dict[tuple[bool, bool, bool, bool], tuple[float | None, float | None]]


FIRST = Report(
    "first report (7B)",
    {
        "parameters": (NONE, NONE, NONE, UP),
        "activations": (NONE, DOWN, DOWN, DOWN),
        "gradients": (NONE, DOWN, DOWN, DOWN),
        "optimizer state": (NONE, DOWN, DOWN, DOWN),
        TIME: (DOWN, UP, UP, UP),  # its row is called computation
    },
    {
        (False, False, False, False): (None, None),
        (False, False, False, True): (30151.60, 283.11),
        (False, False, True, False): (None, None),
        (False, False, True, True): (39151.60, 109.11),
        (True, False, False, False): (None, None),
        (True, False, False, True): (30199.60, 279.09),
        (True, False, True, False): (None, None),
        (True, False, True, True): (39350.50, None),
    },
)
SECOND = Report(
    "second report (1.5B)",
    {
        "parameters": (NONE, NONE, NONE, DOWN),
        "activations": (DOWN, DOWN, DOWN, NONE),
        "gradients": (UP, UP, DOWN, DOWN),
        "optimizer state": (UP, NONE, DOWN, DOWN),
        "FLOPs": (NONE, UP, NONE, NONE),
        TIME: (UP, UP, DOWN, NONE),
    },
    {
        (True, False, False, False): (13993.84, 38.02),
        (True, False, False, True): (7523.20, 22.64),
        (True, False, True, False): (None, None),
        (True, False, True, True): (9630.22, 27.00),
        (True, True, False, False): (13358.04, 40.99),
        (True, True, False, True): (6864.00, 29.13),
        (True, True, True, False): (None, None),
        (True, True, True, True): (7958.86, 39.57),
        (False, False, False, False): (11624.06, 35.79),
        (False, False, False, True): (7521.13, 22.71),
        (False, False, True, False): (11624.91, 50.50),
        (False, False, True, True): (9620.55, 27.07),
        (False, True, False, False): (11623.09, 41.23),
        (False, True, False, True): (6857.48, 28.48),
        (False, True, True, False): (11623.79, 57.52),
        (False, True, True, True): (7954.38, 34.54),
    },
)
REPORTS = (FIRST, SECOND)
# What each says in words or in the output of its runs against a cell of its own tables.
IN_WORDS = (
    "first report: the text under the arrows has gradient accumulation lower the memory of parameters, activations, "
    "gradients and optimizer state, the table has none of the four; the text has the time rise, the table fall",
    "first report: the text has checkpointing raise the memory of activations and gradients and lower the time, which "
    "its next sentence has rise; the table has both kinds of memory fall and the time rise",
    "first report: the text has mixed precision lower parameters and the time; the table has none and up",
    "first report: the text has LoRA lower parameters; the table has up",
    "first report: with accumulation, mixed precision and LoRA there is a peak of 39350.5 MB, and x as the time: the "
    "run ended out of memory",
    "first report: 12,582,912 trained parameters; rank 16 on q and v of 32 layers of 4096 has 8,388,608",
    "second report: LoRA's arrow for parameters is down, its runs print 1,498,482,688 without it and 1,500,186,624 "
    "with it",
    "second report: the text has checkpointing take 30 to 40% less memory and 20 to 30% more time; its cells have 0 to "
    "9% less memory without mixed precision, 17% with LoRA and mixed precision, and 8 to 47% more time",
)
