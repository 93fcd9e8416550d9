"""benchmarks.attention: what it measures, that a kernel's error is a line, and the tables."""

import json

import pytest

from benchmarks import attention, report_attention, rows
from benchmarks.attention import CUDNN, FLASH, VARLEN, Cell
from hyclora.operators.attention import flash, flash4
from tests.operators.attention.test_flash4 import stand_in

TIMES = {"forward_ms": 1.0, "both_ms": 1.0}


def test_every_kernel_is_asked_for_its_gradients(monkeypatch):
    """Of whole rows and of runs; on a CPU torch has one of the two kernels for rows, the other's error is told."""
    package = stand_in()

    def varlen(q, k, v, starts, same, longest, other, *, scale, window_size, enable_gqa=True):
        return package.flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=starts, cu_seqlens_k=same, max_seqlen_q=longest, max_seqlen_k=other,
            softmax_scale=scale, causal=True, window_size=(None, None) if window_size[0] < 0 else window_size,
        )[0]  # fmt: skip

    monkeypatch.setattr(flash4, "package", lambda: package)
    monkeypatch.setattr(flash, "varlen_attn", varlen, raising=False)
    monkeypatch.setattr(attention, "graph_ms", lambda call: call() or 1.0)
    found = attention.measure(Cell(2, 24, heads=4, kv_heads=2), "cpu")
    assert list(found) == [CUDNN, FLASH, flash4.PACKAGE] and found[FLASH] == found[flash4.PACKAGE] == TIMES
    assert "kernel" in found[CUDNN]["error"]
    for cell in (Cell(seq_len=25, runs=3, heads=4, kv_heads=2), Cell(seq_len=25, window=9, heads=4, kv_heads=4)):
        assert attention.measure(cell, "cpu") == {VARLEN: TIMES, flash4.PACKAGE: TIMES}


def test_without_such_a_gpu_or_the_package_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(flash4, "suits", lambda device, dtype, head_dim: False)
    with pytest.raises(SystemExit) as stopped:
        attention.main([])
    assert stopped.value.code == 2 and "needs a GPU of Hopper and flash-attn-4" in capsys.readouterr().err


def line(**values) -> dict:
    versions = {name: "1" for name in ("torch", "triton", "transformers", "peft")}
    return {"versions": versions, "device": "NVIDIA H200", "commit": "abc", **values}


def test_tables(tmp_path, monkeypatch):
    """The last line of a cell, shares of torch's fastest, errors; steps with the package below the same without it."""
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    assert report_attention.attention() == ""
    cell = {"rows": 1, "seq_len": 4096, "runs": 1, "kv_heads": 8, "window": None, "heads": 32}
    first = {CUDNN: {"error": "no | kernel"}, FLASH: TIMES, flash4.PACKAGE: TIMES}
    last = first | {FLASH: {"forward_ms": 1.0, "both_ms": 4.0}}
    packed = {"kernels": {VARLEN: TIMES, flash4.PACKAGE: {"error": "none"}}, "cell": cell | {"runs": 4}}
    kernels = [line(cell=cell, kernels=first), line(**packed), line(cell=cell, kernels=last)]
    arguments = {"shape": "llama-2-7b", "base": "nf4", "lora_rank": 16, "batch_size": 1, "seq_len": 8192}
    step = {"arguments": arguments | {"device": "cuda"}, "setting": {"offload": True}, "dyn_mib": 1, "held_mib": 2}
    without = line(**step, host_mib=3, ms=9.0, time="2026")
    with_it = without | {"ms": 8.0, "versions": without["versions"] | {flash4.PACKAGE: "4.0"}}
    other = without | {"commit": "other", "ms": 7.0}
    for name, lines in (("attention", kernels), ("memory_throughput", [without, other, with_it])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    table = report_attention.attention()
    assert "| 1 x 4096 tokens, 32 heads, 8 of k and v | no / kernel | 1 / 4 |  | 1 / 1 | 0.25x |" in table
    assert "| 1 x 4096 tokens, in 4 runs, 32 heads, 8 of k and v |  |  | 1 / 1 | none |  |" in table
    assert [row.split(" | ")[2:] for row in table.splitlines() if "llama-2-7b" in row] == [
        ["torch's", "1", "2", "3", "9.0 |"],
        ["flash-attn-4", "1", "2", "3", "8.0 |"],
    ]
    assert "torch 1, triton 1, transformers 1, peft 1; flash-attn-4 4.0 in some rows; commit" in table
    assert [one["ms"] for one in rows.load("memory_throughput", "commit")] == [9.0, 7.0]
