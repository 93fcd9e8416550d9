"""The tables of a plan: what a terminal has room for, and all that is known."""

import re
from dataclasses import replace

import pytest

from hyclora.plan import main, plan
from hyclora.utils.planning.modes import EMBEDDINGS, MODES
from hyclora.utils.planning.telling import DETAILS, OUTDONE, SHORT, WIDTH, standing
from hyclora.utils.planning.times import Time

GIB = 2**30
CHECKPOINTING, INPUTS = "checkpointing, resident layer inputs, exact", "resident layer inputs, layer by layer, exact"


@pytest.fixture(scope="module")
def roomy():
    return plan("llama-3-8b", "24GiB", "64GiB")


@pytest.fixture(scope="module")
def tight():
    """No mode fits, but some do with embeddings in host memory."""
    return plan("llama-3-8b", "8GiB", "64GiB", (1, 4096), lora_rank=32)


def named(found, name):
    return next(row for row in found.rows if row.mode.name == name)


def timed(found, **ms):
    """Times of all modes, 100 ms but for some."""
    times = {row.mode.name: Time(100.0) for row in found.rows} | {name: Time(one) for name, one in ms.items()}
    return replace(found, rows=[replace(row, time=times[row.mode.name]) for row in found.rows])


def table_of(text: str, place: int = 0) -> list[list[str]]:
    """Cells of a table, of which the first column may have single spaces."""
    between = re.split(r"^-+$", text, flags=re.MULTILINE)[1::2][place]
    return [re.split(r"\s{2,}", line.strip()) for line in between.strip().splitlines()]


def test_a_terminal_has_room(roomy, tight):
    for found in (roomy, timed(roomy), tight, timed(tight)):
        assert max(map(len, str(found).splitlines())) <= WIDTH
    assert "tokens/s" in str(timed(roomy)) and "tokens/s" not in str(roomy)


def test_each_mode_is_in_both_forms_with_the_same_numbers(roomy):
    (head, *short), (wide_head, *wide) = table_of(str(roomy)), table_of(roomy.details())
    assert head == [name for name, _ in SHORT if name != "tokens/s"]
    assert wide_head == [name for name, _ in DETAILS if name != "real tokens/s"]
    assert [cells[0] for cells in short] == [cells[0] for cells in wide] and len(short) == len(MODES)
    for cells, more in zip(short, wide, strict=True):
        row, sizes = named(roomy, cells[0]), dict(zip(head, cells, strict=False))
        need = row.need
        said = [f"{n / GIB:.2f}" for n in (need.gpu, sum(need.static.values()), need.dyn, need.on_host)]
        assert [sizes[name] for name in ("GPU GiB", "static", "dyn", "host GiB")] == said
        assert sizes["longest"] == str(row.longest) and f"{row.longest} tokens" in more
        told = dict(zip(wide_head, more, strict=True))
        assert told["GPU in all"] == f"{said[0]} GiB" and told["dyn"] == f"{said[2]} GiB"
        assert told["longest, embeddings on host"] == f"{row.hosted} tokens" and told["a micro-step"] == str(row.time)
        assert told["count of dyn, where measured"] == row.near


def test_modes_that_are_outdone_and_that_do_not_fit_come_last():
    found = plan("llama-3-8b", "12GiB", "64GiB", (1, 8192))
    stands = [cells[1] for cells in table_of(str(found))[1:]]
    assert {"yes", "outdone", "no"} == set(stands)
    assert stands == sorted(stands, key=["yes", "outdone", "no"].index) and len(stands) == len(MODES)
    none = replace(found, rows=[replace(row, fits=False) for row in found.rows])
    assert [OUTDONE in " ".join(str(one).split()) for one in (found, none)] == [True, False]
    assert "\nno mode fits; the longest single row is " in str(none)


def test_what_is_better_in_nothing_is_outdone(roomy):
    rows = roomy.rows
    assert standing(named(roomy, INPUTS), rows) == "outdone" and standing(named(roomy, CHECKPOINTING), rows) == "yes"
    assert standing(named(roomy, "resident, CUDA graphs, 8 bit"), rows) == "yes"  # the others have fewer bits
    assert standing(named(roomy, "resident, CUDA graphs, 4 bit"), rows) == "yes"  # or are slower by their kind
    alone = [row for row in rows if row.mode.name != CHECKPOINTING]
    assert standing(named(roomy, INPUTS), alone) == "yes"
    none = [replace(row, fits=row.mode.name == INPUTS) for row in rows]  # what does not fit outdoes nothing
    assert standing(next(row for row in none if row.fits), none) == "yes"
    assert standing(none[0], none) == "no"


@pytest.mark.parametrize("ms, stands", [(103.0, "outdone"), (99.0, "outdone"), (104.0, "yes")])
def test_measured_times_are_compared_where_there_are_some(roomy, ms, stands):
    """As far as two can be told apart."""
    found = timed(roomy, **{CHECKPOINTING: ms})
    assert standing(named(found, INPUTS), [named(found, name) for name in (INPUTS, CHECKPOINTING)]) == stands


def test_graphs_that_are_measured_to_be_slower_are_outdone(roomy):
    names = ("resident, CUDA graphs, 4 bit", "resident, layer by layer, 4 bit")
    graphs, launched = (named(roomy, name) for name in names)
    assert standing(graphs, [graphs, launched]) == "yes"
    graphs, launched = replace(graphs, time=Time(200.0)), replace(launched, time=Time(100.0))
    assert standing(graphs, [graphs, launched]) == "outdone"


def test_modes_with_embeddings_on_the_host_have_a_table(tight):
    text = str(tight)
    ordinary, hosted = (table_of(text, place) for place in (0, 1))
    assert text.index("with embeddings in host memory:\n---") > text.index("exact, resident")
    assert {cells[1] for cells in ordinary[1:]} == {"no"} and {cells[1] for cells in hosted[1:]} <= {"yes", "outdone"}
    names = {row.mode.name.removesuffix(EMBEDDINGS) for row in tight.rows if row.fits}
    assert {cells[0] for cells in hosted[1:]} == names and all(row.mode.name in tight.details() for row in tight.rows)


def test_peers_have_the_same_columns(roomy):
    for text, columns in ((str(roomy), SHORT), (roomy.details(), DETAILS)):
        head, *rows = table_of(text, 1)
        assert head == [name for name, _ in columns if name in head] and [cells[0] for cells in rows] == [
            row.mode.name for row in roomy.peers
        ]
    assert "of others within 0.2 % of 3 measured lines" in roomy.details() and "measured lines" not in str(roomy)


def test_the_longest_row_is_told_wherever_something_fits(roomy):
    longest = max(max(row.longest, row.hosted) for row in roomy.rows)
    told = f"\nthe longest single row is {longest} tokens (offloaded layer inputs, layer by layer, 8 bit, embeddings"
    assert told in str(roomy)
    short = replace(roomy, rows=[replace(row, longest=0, hosted=None) for row in roomy.rows])
    assert "\nnot even a row of 64 tokens fits\n" in str(short)


def test_details_are_asked_for(capsys):
    command = ["llama-3.2-1b", "--gpu", "16GiB", "--host", "1GiB"]
    for options in ([], ["--details"]):
        main([*command, *options])
        assert ("count of dyn, where measured" in capsys.readouterr().out) == bool(options)
