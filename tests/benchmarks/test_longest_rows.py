"""The longest row of a card: what is planned, the cap where layers are missing, shorter rows, lines and their table."""

import json
import types
from dataclasses import asdict, replace

import pytest

from benchmarks import longest_rows, report_longest_rows, rows
from benchmarks.longest_rows import (
    BESIDE,
    GIB,
    MIB,
    MULTIPLE,
    SHORTER,
    choose_mode,
    main,
    parse,
    planned,
    seconds_a_layer,
)
from benchmarks.peers import OUT_OF_MEMORY
from benchmarks.plan_check import Case, is_of_earlier_build, predict
from benchmarks.record import RESULTS, read
from hyclora.models.config import HycloraConfig
from hyclora.utils.planning import Savers, Shape, count

SHAPE = "llama-3.2-1b"


@pytest.fixture(scope="module")
def shape():
    return Shape(SHAPE, "nf4", 32)


def rows_of(shape, *options, card=8, tokens=None):
    return list(planned(parse(["--shape", SHAPE, *options]), shape, card, tokens))


def test_the_longest_row_fits_by_the_plan_and_a_longer_one_does_not(shape):
    row, *shorter = rows_of(shape, "--layers", "0", "--match", "offloaded, layer by layer, 4 bit")
    savers = Savers(shape, HycloraConfig(**row.case.setting))

    def allocated(tokens):
        need = count(savers, 1, tokens)
        return sum(need.static.values()) + need.held

    tokens = row.case.seq_len
    assert allocated(tokens) <= row.limit * MIB == 8 * GIB - BESIDE < allocated(tokens + MULTIPLE)
    assert [one.case.seq_len for one in shorter] == [
        int(tokens * SHORTER) // MULTIPLE * MULTIPLE,
        int(shorter[0].case.seq_len * SHORTER) // MULTIPLE * MULTIPLE,
    ]


def test_host_memory_decides_too(shape):
    (row, *_), (other, *_) = rows_of(shape), rows_of(shape, "--host", "1GB")
    assert predict(other.case, 0)["host_mib"] * MIB <= 1e9 < predict(row.case, 0)["host_mib"] * MIB
    assert other.case.seq_len < row.case.seq_len


def test_the_cap_is_lowered_by_what_the_missing_layers_take(shape):
    """What is left of it beside the layers that are run is what all of them would leave."""
    (full, *_), (few, *_) = (rows_of(shape, "--layers", n, tokens=16384) for n in ("0", "3"))
    assert (full.case.layers, few.case.layers) == (16, 3)
    taken = [sum(predict(one.case, one.case.layers)[x] for x in ("static_mib", "held_mib")) for one in (full, few)]
    assert full.limit - taken[0] == pytest.approx(few.limit - taken[1], abs=1.5) and taken[0] > taken[1] + 500


def test_embeddings_wait_in_host_memory_where_that_makes_rows_longer():
    """Of a row that is asked for, where it has no room otherwise; a head that has their weight keeps them."""
    untied, args = Shape("llama-3-8b", "nf4", 32), parse([])
    told = {tokens: choose_mode(untied, 8, args, tokens) for tokens in (None, 3072, 10240)}
    on_host = {tokens: mode.config.offload_embeddings for tokens, (mode, _) in told.items()}
    assert on_host == {None: True, 3072: False, 10240: True} and told[None][1] > told[3072][1] >= 3072
    row = next(planned(parse(["--shape", "llama-3-8b", "--layers", "2"]), untied, 8, None))
    assert row.mode.endswith("embeddings in host memory") and row.case.setting["offload_embeddings"]
    kept = replace(row.case, setting={k: v for k, v in row.case.setting.items() if k != "offload_embeddings"})
    counted = [predict(case, 2) for case in (kept, row.case)]
    assert [round(counted[i]["static_mib"] - counted[1 - i]["static_mib"]) for i in (0, 1)] == [1002, -1002]
    assert round(counted[1]["host_mib"] - counted[0]["host_mib"]) == 1002


def test_the_cap_holds_from_calibration_on(monkeypatch):
    """The order on a GPU: the model, the cap, short rows, and the long one with AdamW's step."""
    done = []
    said = types.SimpleNamespace(step=lambda: done.append("AdamW"))

    class Step:
        def __init__(self, model, batch, short):
            done.append((batch, short))
            self.optimizer = said

        def memory(self):
            done.append("forward, backward")
            return {"dyn_mib": 1.0}

    fakes = {
        "empty_cache": lambda: None,
        "synchronize": lambda: None,
        "mem_get_info": lambda: (10 * GIB, 80 * GIB),
        "set_per_process_memory_fraction": lambda share: done.append(share),
        "max_memory_reserved": lambda: 3 * MIB,
        "memory_reserved": lambda: 2 * MIB,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(f"torch.cuda.{name}", fake)
    monkeypatch.setattr("hyclora.utils.profiling.MicroStep", Step)
    monkeypatch.setattr(longest_rows, "batch_of", lambda case, vocab: case.seq_len)
    model = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=100))
    monkeypatch.setattr(longest_rows, "model_of", lambda case: done.append("model") or model)
    found = longest_rows.measure(Case(SHAPE, 1, 50000), 20 * 1024)
    assert done == ["model", 0.25, (50000, 2048), "forward, backward", "AdamW"]
    assert (found["dyn_mib"], found["reserved_mib"], found["card_mib"]) == (1.0, 3.0, 70 * 1024 - 2.0)


def test_as_many_layers_as_the_time_allows_two_at_least(shape):
    assert 40 < seconds_a_layer(shape, 2**20) < 50
    for seconds, layers in {"10": 2, "250": 5, "9999": 16}.items():
        assert rows_of(shape, "--seconds", seconds, tokens=2**20, card=80)[0].case.layers == layers
    assert seconds_a_layer(shape, 2**20) == pytest.approx(4 * seconds_a_layer(shape, 2**19), rel=0.05)


def test_a_row_on_a_cpu(tiny_llama_folder, tmp_path, monkeypatch):
    """In a process of its own, as every row is."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # kernels are for other tests
    options = ["--shape", str(tiny_llama_folder), "--cards", "1", "--tokens", "48", "--base", "bf16", "--layers", "1"]
    main(["--device", "cpu", "--output_dir", str(tmp_path), *options])
    (line,) = lines_in(tmp_path)
    assert line["fits"] and line["measured"]["buffered_mib"] > 0 and line["card_gib"] == 1
    assert (line["predicted"]["layers"], line["full"]["layers"], line["arguments"]["seq_len"]) == (1, 2, 48)


def lines_in(folder):
    return [json.loads(line) for line in (folder / "longest_rows.jsonl").read_text().splitlines()]


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """The lines of a command, where rows of more than 9216 tokens run out of memory."""
    monkeypatch.setattr(longest_rows, "check", lambda args: None)
    numbers = {"static_mib": 2048.0, "dyn_mib": 1024.0, "held_mib": 2048.0, "host_mib": 512.0, "reserved_mib": 4096.0}
    numbers |= {"seconds": 2.04, "card_mib": 500.0}
    ran = []

    def in_a_process(row, timeout):
        ran.append(row.case.seq_len)
        return {"error": OUT_OF_MEMORY} if row.case.seq_len > 9216 else dict(numbers)

    monkeypatch.setattr(longest_rows, "in_a_process", in_a_process)

    def run(*options):
        ran.clear()
        main(["--shape", SHAPE, "--output_dir", str(tmp_path), "--layers", "4", *options])
        return list(ran)

    return run


def test_a_row_that_runs_out_of_memory_keeps_its_line_and_a_shorter_one_is_tried(swept, tmp_path):
    command = ["--cards", "8", "12", "--tokens", "10240", "20480"]
    assert swept(*command) == [10240, 9216, 20480, 19456, 18432]
    found = lines_in(tmp_path)
    assert [line["fits"] for line in found] == [False, True, False, False, False]
    assert found[0]["measured"] == {"error": OUT_OF_MEMORY} and found[1]["measured"]["dyn_mib"] == 1024.0
    assert (found[1]["card_gib"], found[1]["seconds"], found[1]["context_mib"]) == (8, 2.04, 500.0)
    assert found[1]["mode"] and found[1]["limit_mib"] < 8 * 1024 - 512
    assert swept(*command) == [] and len(lines_in(tmp_path)) == 5  # all of it is known


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines() if row[:1] == "|"]


def test_published_cards_are_there_before_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    head, _, *found = cells(report_longest_rows.longest_rows())
    assert head[0] == "llama-3-8b, NF4, rank 32" and len(found) == 7
    assert found[0] == ["8 GiB", *[""] * 6, "2972", ""] and found[-1][0] == "80 GiB"


def test_the_table_has_the_longest_row_that_fits(swept, tmp_path, monkeypatch):
    """At full depth, and of fewer layers where such a row is longer."""
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    for tokens in ("10240", "4096"):
        swept("--cards", "8", "--tokens", tokens)
    swept("--cards", "12", "--tokens", "20480")
    swept("--cards", "16", "--tokens", "4096")
    swept("--cards", "16", "8", "--tokens", "2048", "8192", "--layers", "0")
    lines = lines_in(tmp_path)
    for line in lines:
        line |= {"device": "NVIDIA H200", "versions": dict.fromkeys(("torch", "triton", "transformers", "peft"), "1")}
        line["arguments"]["shape"] = "llama-3-8b"
    lines[-1]["versions"] |= {"flash-attn-4": "2"}
    (tmp_path / "longest_rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = report_longest_rows.longest_rows()
    head, _, whole, eight, twelve, *sixteen = cells(text)[:7]
    fits = lines[1]
    rest = sum(fits["full"][x] - fits["predicted"][x] for x in ("static_mib", "held_mib"))
    assert head[0] == "H200, llama-3-8b, NF4, rank 32" and "`python -m benchmarks.longest_rows`" in text
    assert "torch 1, triton 1, transformers 1, peft 1; flash-attn-4 2 in some rows; commit" in text
    assert eight[:4] == ["8 GiB", "9216", fits["mode"], "4 of 16"] and rest > 0
    assert eight[4] == f"{(4096 + rest) / 1024:.1f}" and eight[6:] == ["2.0", "2972", "3.1x"]
    assert whole[:2] == ["8 GiB", "8192"] and whole[3] == "16 of 16" and whole[-1] == "2.8x"
    assert twelve[1] == "" and twelve[2].endswith(f": 18432 tokens, {OUT_OF_MEMORY}") and twelve[-1] == ""
    assert [(row[1], row[3]) for row in sixteen] == [("2048", "16 of 16"), ("4096", "4 of 16")]


@pytest.mark.parametrize(
    "options, said",
    [
        (["--shape", "nowhere"], "a folder with a config.json"),
        (["--cards", "8", "12", "--tokens", "4096"], "--tokens has 1 numbers for 2 cards"),
        (["--shape", SHAPE, "--cards", "1", "8"], "--cards 1: not even a row of 1024 tokens"),
        (["--shape", SHAPE, "--match", "3 bit"], "is called so"),
        (["--shape", SHAPE, "--tokens", "9999999", "--cards", "8", "--layers", "2"], "layers that are not run"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_runs(options, said, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["--device", "cpu", "--output_dir", str(tmp_path), *options])
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_it_needs_a_gpu(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2 and "needs a GPU" in capsys.readouterr().err


def test_a_row_says_what_it_is(shape):
    row = rows_of(shape, "--layers", "3", tokens=4096)[0]
    assert str(row) == f"{SHAPE}, 8 GiB: 4096 tokens, {row.mode}, 3 of 16 layers"
    assert Case(**json.loads(json.dumps(asdict(row.case)))) == row.case


def test_counts_are_near_what_long_rows_took():
    """Never under by more than half a per cent. Of gaps it allows for what torch takes without room for more."""
    lines = [line for line in read(RESULTS / "longest_rows.jsonl") if "held_mib" in line["measured"]]
    found = [line for line in lines if not is_of_earlier_build(line)]
    assert found
    for line in found:
        case, measured = Case(**line["arguments"]), line["measured"]
        counted = predict(case, case.layers)
        assert -0.005 <= counted["dyn_mib"] / measured["dyn_mib"] - 1 <= 0.07
        room = line["limit_mib"] - line["reserved_mib"]
        assert -room / 3 <= counted["held_mib"] - measured["held_mib"] <= 4096
