"""The table of real rows: made of lines, by GPU and cell, beside the fastest peer of the same cell."""

import json

import pytest

from benchmarks import rows
from benchmarks.report_real_rows import packed_rows, real_rows


def line(setting, speed: int | None, **changes) -> dict:
    arguments = {"shape": "llama-2-7b", "base": "nf4", "lora_rank": 16, "batch_size": 4, "seq_len": 512}
    arguments |= {"device": "cuda"} | changes.pop("arguments", {})
    versions = dict.fromkeys(("torch", "triton", "transformers", "peft"), "1")
    found = {"device": "NVIDIA H200", "commit": "c" * 40, "time": "2026-01-01", "versions": versions}
    found |= {"setting": rows.whole(setting), "arguments": arguments}
    if speed is not None:
        found |= {"real_tokens_per_second": speed, "real_tokens": 855, "ms": 70.2, "dyn_mib": 300.0, "held_mib": 600.4}
    return found | changes


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)

    def table(*lines) -> list[list[str]]:
        (tmp_path / "real_rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
        text = real_rows()
        return [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines() if row[:1] == "|"]

    return table


def test_settings_beside_the_fastest_peer(table):
    head, _, *found = table(
        line("PEFT LoRA", 2000),
        line({"offload": True}, 12000, first_100_s=14.44),
        line("Unsloth", None, error="not done after 1 s"),
        line("Unsloth, offloaded checkpointing", 4000),
        line({"offload": True, "cuda_graphs": False, "stream": False}, 3000),
    )
    assert head[0] == "H200, llama-2-7b, NF4: 4 GSM8K rows, 855 real tokens"
    assert found[0] == ["**HyC-LoRA least_memory, 4 bit**", "12000", "3.00x", "70", "14.4", "300", "600"]
    assert [row[2] for row in found[1:]] == ["1.00x", "0.75x", "0.50x", ""]
    assert found[-1][:2] == ["Unsloth", "not done after 1 s"] and "stream False" in found[2][0]


def test_packed_rows_are_tables_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    packed = line({"offload": True}, 12000, arguments={"batch_size": 1, "seq_len": 2048})
    (tmp_path / "packed_rows.jsonl").write_text(json.dumps(packed) + "\n")
    assert real_rows() == ""
    assert packed_rows().startswith("| H200, llama-2-7b, NF4: 1 x 2048 tokens, packed Alpaca rows, 855 real tokens |")


def test_what_a_line_says_of_itself(table):
    table(line({"offload": True}, 12000, remark="by hand"), line("Unsloth", 4000))
    assert "*By hand: **HyC-LoRA least_memory, 4 bit**.*" in real_rows()


def test_several_gpus_are_a_table_of_their_own(table):
    found = table(line({"offload": True}, 12000), line({"offload": True}, 23000, arguments={"gpus": 2}))
    assert found[3][0] == "2 x H200, llama-2-7b, NF4: 4 GSM8K rows each, 855 real tokens"


def test_a_table_for_each_dropout_and_number_of_rows(table):
    found = table(
        line({"offload": True}, 12000),
        line({"offload": True}, 11000, arguments={"lora_dropout": 0.05}),
        line({"offload": True}, 10000, arguments={"batch_size": 16}),
        line({"offload": True}, 9000, arguments={"device": "cpu"}, device="x86_64"),
    )
    told = [row[0].split(": ")[1].replace(" GSM8K rows, 855 real tokens", "") for row in found[::3]]
    assert told == ["4", "4, dropout 0.05", "16"]
    assert [row[2] for row in found[2::3]] == [""] * 3
