"""The sweep against the peers on a small shape on the CPU, and the tables and figures of its lines."""

import contextlib
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import figures, memory_throughput, peers, random_checkpoint, ranks, report, rows
from benchmarks.jobs import SHAPES, Job
from benchmarks.memory_throughput import NAME
from benchmarks.peers import NOT_DONE, NOT_INSTALLED, PEERS
from hyclora.models.config import PRESETS, HycloraConfig
from tests.helpers.commands import IN_PROCESS
from tests.helpers.forked import forked


@pytest.fixture
def job(tiny_llama_folder):
    common = {"base": "bf16", "lora_rank": 4, "batch_size": 2, "seq_len": 16, "steps": 1, "warm_up_seq_len": 8}
    return Job({"q_bit": 2}, str(tiny_llama_folder), **common, device="cpu", checkpoints="ckpt")


def test_peers_keep_what_they_say(job):
    names = [name for name in PEERS if "PEFT" in name and "offloaded" not in name]
    full, every, second = (peers.measure(replace(job, setting=name))["buffered_mib"] for name in names)
    assert full > second > every
    assert full > peers.measure(job)["buffered_mib"]


@pytest.mark.parametrize("name, mode", [("Unsloth", False), ("Unsloth, offloaded checkpointing", "unsloth")])
def test_unsloth_loads_a_checkpoint_that_is_written_once(job, tmp_path, monkeypatch, name, mode):
    """With a stand-in for the package: it needs a GPU."""
    calls = []

    class FastLanguageModel:
        from_pretrained = staticmethod(lambda folder, **options: (calls.append((folder, options)), None))
        get_peft_model = staticmethod(lambda model, **options: calls.append((model, options)) or "adapted")

    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=FastLanguageModel))
    monkeypatch.setattr(peers.subprocess, "run", lambda command, **_: random_checkpoint.main(command[3:]))
    long = replace(job, seq_len=8192, checkpoints=str(tmp_path))
    assert PEERS[name].build(long) == "adapted"
    (folder, loading), (_, adapters) = calls
    config = json.loads(Path(folder, "config.json").read_text())
    assert config["max_position_embeddings"] == loading["max_seq_length"] == 8192 and not loading["load_in_4bit"]
    assert loading["use_gradient_checkpointing"] is adapters["use_gradient_checkpointing"] is mode
    assert adapters["r"] == adapters["lora_alpha"] == 4 and len(adapters["target_modules"]) == 7
    monkeypatch.setattr(peers.subprocess, "run", lambda *_, **__: pytest.fail("written again"))
    PEERS[name].build(replace(long, seq_len=16))
    assert json.loads(Path(folder, "config.json").read_text()) == config and calls[2][1]["max_seq_length"] == 2048


def test_sweep_keeps_failures_and_continues_where_it_stopped(tiny_llama_folder, tmp_path, capsys, monkeypatch):
    settings = ["PEFT LoRA", {"q_bit": 2}, {"q_bit": "auto", "average_bits": 0.5}, "Unsloth"]
    common = ["--shapes", str(tiny_llama_folder), "--cells", "2x16", "--steps", "1", "--device", "cpu"]
    options = [*common, "--base", "bf16", "--output_dir", str(tmp_path), "--settings", json.dumps(settings)]
    monkeypatch.setattr(peers, "subprocess", IN_PROCESS)
    monkeypatch.setitem(PEERS, "Unsloth", replace(PEERS["Unsloth"], needs="no_such_module"))
    memory_throughput.main(options)
    file = tmp_path / f"{NAME}.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["setting"] for line in lines] == [rows.whole(setting) for setting in settings]
    assert lines[0]["buffered_mib"] > lines[1]["buffered_mib"] and lines[1]["tokens_per_second"] > 0
    assert lines[2]["error"].startswith("ValueError: average_bits=0.5") and lines[3]["error"] == NOT_INSTALLED

    capsys.readouterr()
    memory_throughput.main(options)
    assert capsys.readouterr().out.count("measured already") == 3, "a peer may have been installed since"
    assert len(file.read_text().splitlines()) == 5

    file.write_text(file.read_text() + '{"cut o')
    with pytest.raises(SystemExit):
        memory_throughput.main(options)
    assert f"{file}, line 6 is not JSON" in capsys.readouterr().err


def test_a_job_that_was_not_done_in_time_gets_more_of_it(job):
    now = {"commit": "c", "device": "d"}
    line = now | {"setting": job.setting, "arguments": job.arguments, "error": f"{NOT_DONE} 112 s"}
    assert memory_throughput.measured(job, [line], now, timeout=112)
    assert not memory_throughput.measured(job, [line], now, timeout=300)
    assert not memory_throughput.measured(job, [line], now | {"commit": "c-1234abcd"}, timeout=112)
    with_it = now | {"versions": {"flash-attn-4": "4.0"}}
    assert not memory_throughput.measured(job, [line], with_it, timeout=112), "attention is another's"
    assert memory_throughput.measured(job, [line | with_it], with_it, timeout=112)


def begin_sweep(options: list[str], said: Path) -> None:
    """As `python -m benchmarks.memory_throughput` does; what it says on stderr is in `said`."""
    with said.open("w") as file, contextlib.redirect_stderr(file):
        memory_throughput.main(options)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_sweep_that_is_stopped_leaves_no_process_behind(tiny_llama_folder, tmp_path, number, code):
    common = ["--shapes", str(tiny_llama_folder), "--cells", "2x16", "--steps", "1000000", "--device", "cpu"]
    options = [*common, "--base", "bf16", "--output_dir", str(tmp_path), "--settings", '["PEFT LoRA"]']
    sweep = forked().Process(target=begin_sweep, args=(options, tmp_path / "said.txt"))
    sweep.start()

    def measuring():
        """The child of the sweep that has come to load torch."""
        for pid in Path(f"/proc/{sweep.pid}/task/{sweep.pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                own = b"benchmarks.peers" in Path(f"/proc/{pid}/cmdline").read_bytes()
                if own and "libtorch" in Path(f"/proc/{pid}/maps").read_text():
                    return pid
        return None

    while not (child := measuring()):
        assert sweep.is_alive()
        time.sleep(0.1)
    os.kill(sweep.pid, number)
    sweep.join(30)
    assert sweep.exitcode == code
    assert number != signal.SIGINT or "goes on where it stopped" in (tmp_path / "said.txt").read_text()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_process_whose_sweep_has_ended_does_not_measure(monkeypatch):
    """The sweep may end while it starts one."""
    monkeypatch.setenv(ranks.PARENT, "0")
    monkeypatch.setattr(ranks.ctypes, "CDLL", lambda name: SimpleNamespace(prctl=lambda *_: None))
    with pytest.raises(SystemExit, match="has ended"):
        peers.main(["{}"])


@pytest.mark.parametrize("visible, seen", [(None, "0,1"), ("3,1,2", "3,1"), ("", "0,1"), ("GPU-5", "GPU-5")])
def test_a_job_sees_as_many_gpus_as_it_takes(job, visible, seen, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert peers.gpus_of(replace(job, gpus=2)) == seen


def test_a_process_that_dies_or_hangs_is_a_cause(job, monkeypatch):
    monkeypatch.setattr(peers.sys, "executable", "/bin/false")
    assert peers.run(job, 10)["error"] == "RuntimeError: exit code 1, nothing said"
    monkeypatch.undo()
    assert peers.run(job, 0.01)["error"] == "not done after 0.01 s"
    assert peers.cause(torch.OutOfMemoryError("CUDA")) == peers.cause(RuntimeError("Out of memory!")) == "out of memory"


def test_the_sweep_refuses(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        memory_throughput.main([])
    assert "needs a GPU" in capsys.readouterr().err
    mistakes = {"--cells": ("4", "0x16", "4x1"), "--steps": ("0",), "--lora_rank": ("-1",), "--warm_up_seq_len": ("1",),
                "--settings": ('["Nobody"]', '{"q_bit": 3}', '[{"qbit": 2}]', '[{"q_bit": 5}]', "[3]"),
                "--device": ("cuda:0",)}  # fmt: skip
    for option, value in ((option, value) for option, values in mistakes.items() for value in values):
        with pytest.raises(SystemExit):
            memory_throughput.main(["--device", "cpu", option, value])
        assert value.strip('"[]') in capsys.readouterr().err
    with pytest.raises(SystemExit):
        memory_throughput.main(["--device", "cpu", "--output_dir", "/proc/nowhere"])
    assert "/proc/nowhere cannot be written" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        memory_throughput.main(["--shapes", "nowhere", "--device", "cpu"])
    assert "nowhere has no config.json" in capsys.readouterr().err


def test_settings_stand_for_lists():
    assert memory_throughput.settings('["peers", {"q_bit": 2}]') == [*PEERS, {"q_bit": 2}]
    assert len({rows.name_of(setting) for setting in memory_throughput.OURS}) == len(memory_throughput.OURS)
    assert memory_throughput.cell("1x131072") == (1, 131072)


def test_random_weights_are_written_once(job, tmp_path, monkeypatch):
    """Of two jobs that begin together on two GPUs one writes them, the other waits."""
    written = []

    def write(command, **_):
        written.append(command)
        time.sleep(0.1)
        random_checkpoint.main(command[3:])

    monkeypatch.setattr(peers.subprocess, "run", write)
    long = replace(job, seq_len=8192, checkpoints=str(tmp_path / "new"))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(peers.random_weights, [long, long])
    assert first == second and len(written) == 1
    assert json.loads((first / "config.json").read_text())["max_position_embeddings"] == 8192


def test_random_checkpoint(tiny_llama_folder, tmp_path):
    random_checkpoint.main([str(tiny_llama_folder), str(tmp_path / "random")])
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in (tmp_path / "random").iterdir()}


def test_shapes_are_configurations():
    from transformers import AutoConfig

    sizes = {folder.name: AutoConfig.from_pretrained(folder).hidden_size for folder in SHAPES.iterdir()}
    llamas = {"llama-2-7b": 4096, "llama-2-13b": 5120, "llama-3-8b": 4096, "mistral-7b": 4096}
    assert sizes == llamas | {"llama-3.2-1b": 2048, "qwen2.5-7b": 3584, "qwen3-8b": 4096, "llama-2-70b": 8192} | {
        "smollm2-135m": 576
    }


def test_a_setting_has_one_name():
    """That of the preset that it is but for its bits, or what it differs in."""
    assert rows.name_of({}) == rows.name_of(HycloraConfig().to_dict()) == "HyC-LoRA default, 4 bit"
    for name, preset in PRESETS.items():
        assert name in rows.presets_of(preset.settings)
        assert rows.name_of(preset.settings | {"q_bit": 2}) == f"HyC-LoRA {name}, 2 bit"
    assert rows.presets_of({"q_bit": 2}) == rows.presets_of("Liger") == rows.presets_of({"cuda_graphs": False}) == []
    assert rows.presets_of({}) == ["fastest", "default"], "on one GPU"
    kept = {"offload": True, "cuda_graphs": False, "slot_savers": rows.LSE_KEPT}
    assert rows.name_of(kept) == "HyC-LoRA longest, 4 bit, lse kept"
    inter = {"layer_type": "intra_inter", "attention": "eager"}
    assert rows.name_of(inter) == "intra_inter, 4 bit, attention eager"
    assert rows.name_of({"layer_type": "baseline", "offload": True}) == "baseline (exact), offloaded"
    assert rows.name_of({"cuda_graphs": False}) == "intra_inter_full_fuse, 4 bit"
    assert rows.name_of(None) == "PEFT LoRA"


def test_lines_mean_the_defaults_of_their_time(tmp_path, monkeypatch):
    """What was recorded before settings were whole is intra_inter where it does not say."""
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    settings = [{"q_bit": 4}, rows.whole({"q_bit": 4}), {"layer_type": "intra_inter_full_fuse"}, "Liger", None]
    lines = [{"setting": setting, "arguments": {}, "versions": {}, "number": i} for i, setting in enumerate(settings)]
    (tmp_path / "fidelity.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {rows.name_of(line["setting"]): line["number"] for line in rows.load("fidelity")}
    assert found == {"intra_inter, 4 bit": 0, "HyC-LoRA default, 4 bit": 2, "Liger": 3, "PEFT LoRA": 4}
    assert all(line["setting"] in ("Liger", None) or "q_bit" in line["setting"] for line in rows.load("fidelity"))


def test_lines_say_what_their_numbers_show(tmp_path, monkeypatch):
    """Whatever stream was by default then; auto is CUDA graphs on a GPU, lines of before there were any have none."""
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    settings = [{"cuda_graphs": True, "stream": False}, {"layer_type": "intra_inter_full_fuse"}, rows.whole({})]
    settings += [{"cuda_graphs": False, "offload": True, "stream": False}]
    for name in ("memory_throughput", "buffered"):
        lines = [{"setting": {"layer_type": "intra_inter_full_fuse"} | s, "arguments": {}, "versions": {}, "i": i}
                 for i, s in enumerate(settings)]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {rows.name_of(line["setting"]): line["i"] for line in rows.load("memory_throughput")}
    assert found == {"HyC-LoRA fastest, 4 bit": 2, "intra_inter_full_fuse, 4 bit": 1, "HyC-LoRA longest, 4 bit": 3}
    found = {rows.name_of(line["setting"]): line["i"] for line in rows.load("buffered")}
    assert found == {"HyC-LoRA default, 4 bit": 2, "intra_inter_full_fuse, 4 bit, offloaded": 3}


def line(setting, dyn=None, seq_len=512, batch_size=4, **more):
    """A line as the sweep writes it on a GPU; no dyn is a failure."""
    sizes = {"static_mib": 4400, "trained_mib": 640, "buffered_mib": dyn and dyn / 2, "dyn_mib": dyn, "host_mib": 7}
    speed = {"peak_mib": dyn and 4400 + dyn, "ms": 200.4, "ms_range": [190, 210.0], "tokens_per_second": dyn}
    arguments = {"shape": "llama-2-7b", "base": "nf4", "lora_rank": 16, "batch_size": batch_size, "seq_len": seq_len}
    return {
        **{
            "benchmark": NAME,
            "time": "2026",
            "device": "GPU",
            "commit": "0123456789",
            "setting": setting,
            "versions": VERSIONS,
        },
        **({"error": "out of memory"} if dyn is None else sizes | speed),
        "arguments": {**arguments, "device": "cuda"},
        **more,
    }


VERSIONS = dict.fromkeys(("torch", "triton", "transformers", "peft"), "1")


@pytest.fixture
def reported(tmp_path, monkeypatch):
    """Write lines; the README part and the names of the figures that they make."""
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    for module in (figures, report):
        monkeypatch.setattr(module, "FIGURES", tmp_path)

    def write(*lines):
        (tmp_path / f"{NAME}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for figure in (figures.memory_speed, figures.memory_breakdown, figures.memory_length):
            if drawn := figure():
                drawn.savefig(tmp_path / f"{figure.__name__}.png")
        return report.memory_throughput(), {file.stem for file in tmp_path.glob("*.png")}

    return write


def test_tables_are_sorted_and_keep_failures(reported):
    fillers = [line({"slot_savers": {slot: "quant8"}}, 10000) for slot in ("q", "k", "v", "gate")]
    text, drawn = reported(
        line("PEFT LoRA", 9000), line("Liger"), line({"q_bit": 2}, 900), line("Liger", 8000, seq_len=64),
        line({"q_bit": 2}, 800), line({"q_bit": 2, "layer_type": "intra_inter"}, 700), *fillers,
        line("Liger", 90, 2048, 1), line("PEFT LoRA", 80, 2048, 1),
    )  # fmt: skip
    whole, shared = (part.splitlines() for part in text.split("\n\n") if part.startswith("| "))
    names = [row.split(" | ")[0].strip("| ") for row in whole]
    assert names[0] == "GPU, llama-2-7b, NF4, 4 x 512 tokens"
    assert names[2:4] == ["intra_inter, 2 bit", "PEFT LoRA"] and names[-1] == "Liger"
    assert "| 700 |" in whole[2] and "out of memory" in whole[-1]
    assert shared[0].startswith("| GPU, llama-2-7b, NF4 | static") and len(shared) == 5
    assert shared[2] == "| 4 x 64 tokens: Liger | 4400 | 8000 |  | 4000 (7) | 200 (190 to 210) | 8000 |"
    assert shared[3].startswith("| 1 x 2048 tokens: PEFT LoRA | 4400 | 80 ")
    assert drawn == {"memory_speed", "memory_breakdown"} and "(../figures/memory_breakdown.png)" in text


def test_models_do_not_share_tables(reported):
    other = line("Liger", 70)
    other["arguments"]["shape"] = "mistral-7b"
    text, _ = reported(other, line("Liger", 80))
    assert "| GPU, llama-2-7b, NF4 |" in text and "| GPU, mistral-7b, NF4 |" in text


def test_gpus_do_not_share_tables(reported):
    """The one measured last is first, with all of its tables, and what is drawn."""
    old = [line("Liger", 80), line("Liger", 90, 64), line("PEFT LoRA", 70)]
    new = [line("Liger", 60, device="NVIDIA H9 80GB", time="2027"), line("Liger", 50, 64, device="NVIDIA H9 80GB")]
    text, _ = reported(*old, *new)
    titles = [row.split(" | ")[0] for row in text.splitlines() if "static MiB" in row]
    assert titles == ["| H9, llama-2-7b, NF4", "| GPU, llama-2-7b, NF4"]
    drawn = {line["dyn_mib"] for _, lines in figures._whole_cells("dyn_mib") for line in lines}
    assert drawn == {60, 50}


LEAST, FASTEST = (rows.whole(PRESETS[name].settings) for name in ("least_memory", "fastest"))


def test_the_headline_is_of_a_preset_that_needs_no_more_than_the_most_frugal_peer(reported):
    """And of the GPU measured last; a batch without such a preset, or without peers, is left out."""
    reported(
        line("Liger", 500, ms=300), line("PEFT LoRA", 9000, ms=200), line("PEFT LoRA, checkpointing", 800, ms=400),
        line(LEAST, 450, ms=150, held_mib=600), line(rows.whole({}), 400, ms=160), line(FASTEST, 700, ms=100),
        line(LEAST | {"q_bit": 2}, 90, ms=10), line(LEAST, 90, 64),
        line("Liger", 50, 2048), line(LEAST, 60, 2048), line("Liger", 1, 128, device="old", time="2025"),
    )  # fmt: skip
    found = [row.strip("| ").split(" | ") for row in report.headline().splitlines()[2:] if row.startswith("|")]
    assert [row[1:] for row in found] == [
        ["**HyC-LoRA least_memory, 4 bit**", "450", "600", "7", "150"],
        ["Liger (the most frugal peer)", "500", "", "7", "300"],
        ["PEFT LoRA (the fastest peer)", "9000", "", "7", "200"],
        ["PEFT LoRA, checkpointing", "800", "", "7", "400"],
    ]


def test_what_fits_is_the_least_of_each_and_the_smallest_card_that_has_it(reported):
    """Of the GPU measured last that has the batch; a batch without ours, or without held, is left out."""
    old = {"device": "old", "time": "2025", "held_mib": 9000}
    reported(
        line(LEAST, 450, held_mib=3400), line(FASTEST, 450, held_mib=9000), line("Liger", 500, held_mib=20000),
        line("PEFT LoRA, checkpointing", 800, held_mib=100000), line("PEFT LoRA", 1, 64, held_mib=5),
        line(LEAST, 450, 128), line(LEAST, 450, **old), line(FASTEST, 5, 2048, **old, host_mib=0),
    )  # fmt: skip
    first, second = [row.strip("| ").split(" | ") for row in report.fits().splitlines()[2:] if row.startswith("|")]
    assert first[1:] == [
        "4 x 512 tokens", "least_memory, 4 bit: 8.2 GB, 12 GB card", "Liger: 25.6 GB, 48 GB card",
        "109.5 GB, more than 80 GB",
    ]  # fmt: skip
    assert second[1:3] == ["4 x 2048 tokens", "fastest, 4 bit: 14.1 GB, 16 GB card"]


def test_few_or_no_lines_draw_what_there_is(reported):
    assert reported() == ("", set())
    assert reported(line("PEFT LoRA"))[1] == set()
    assert reported(line("PEFT LoRA", 900), line("PEFT LoRA", 9000, 8192, 1))[1] == {
        "memory_speed", "memory_breakdown",
    }  # fmt: skip
    long = line("PEFT LoRA", 9000, 8192, 1, held_mib=9100)
    assert reported(line("PEFT LoRA", 900), long)[1] >= {"memory_length"}


def test_pareto_front():
    points = [(1, 5), (2, 4), (3, 7), (3, 9), (4, 9)]
    assert figures.pareto(points) == [(1, 5), (3, 9)]


def test_labels_cover_neither_points_nor_each_other():
    figure, axes = figures.plt.subplots()
    points = [(x, 1, f"a name of {x}", "black") for x in (1, 1.01, 1.02, 1.9, 2)]
    axes.plot(*zip(*[point[:2] for point in points], strict=True), "o")
    axes.margins(0.4)
    figures._label(axes, points)
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) == len(points) and all(axes.get_window_extent().contains(*box.min) for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(box.contains(*axes.transData.transform(point[:2])) for box in boxes for point in points)
    figures.plt.close(figure)
