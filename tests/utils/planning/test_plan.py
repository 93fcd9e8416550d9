"""python -m hyclora.plan: what it says, picks and refuses."""

import json
import re
from dataclasses import replace

import pytest

from hyclora.models.config import HycloraConfig
from hyclora.plan import main, plan
from hyclora.utils.args import LoraArguments
from hyclora.utils.errors import UserError
from hyclora.utils.planning import Savers, count, measuring
from hyclora.utils.planning.fitting import STEP, fits
from hyclora.utils.planning.modes import MODES, NEAR, Mode, describe, mode_of
from hyclora.utils.planning.recorded import measured, times
from hyclora.utils.planning.shape import Shape
from hyclora.utils.planning.times import Batch, Time


@pytest.fixture(scope="module")
def roomy():
    return plan("llama-2-7b", "80GB", "64GiB")


def test_the_mode_that_fits_with_the_least_memory_is_chosen(roomy):
    fitting = [row for row in roomy.rows if row.fits]
    assert len(roomy.rows) == len(MODES) and roomy.chosen.need.gpu == min(row.need.gpu for row in fitting)
    assert f"least memory: {roomy.chosen.mode.name}, HycloraConfig(" in str(roomy)


def test_the_longest_row_fits_and_a_longer_one_does_not(roomy):
    for row in (roomy.rows[1], roomy.rows[10]):
        savers = Savers(Shape("llama-2-7b"), row.mode.config)
        longest, longer = (count(savers, 1, row.longest + more) for more in (0, STEP))
        assert fits(longest, roomy.gpu, roomy.host) and not fits(longer, roomy.gpu, roomy.host)


def test_what_a_budget_takes_is_told(roomy):
    assert "\nmemory_budget='74.51 GiB' takes resident, CUDA graphs, 4 bit, for 4 x 512 tokens: " in str(roomy)
    assert plan("llama-2-7b", "80GB", "64GiB", documents=8).budget is None


def test_host_memory_is_a_limit_too():
    little = plan("llama-2-7b", "80GB", "1GiB")
    fits = {row.mode.name: row.fits for row in little.rows}
    assert not fits["offloaded, layer by layer, 4 bit"] and fits["resident, layer by layer, 4 bit"]


def test_a_time_is_unknown_though_it_was_recorded_elsewhere(roomy):
    said = {row.mode.name: str(row.time) for row in roomy.rows}
    assert re.fullmatch(r"unknown here, \d+ ms \(H200\)", said["offloaded, CUDA graphs, 4 bit"])
    assert said["offloaded, CUDA graphs, 8 bit"] == "unknown" and roomy.fastest is None
    assert "\ntimes are unknown: --measure measures them on the GPU that is planned for\n" in str(roomy)
    assert times(Shape("llama-2-7b", rank=32), 4, 512) == {} == times(Shape("llama-2-7b"), 3, 512)


def test_a_package_that_few_have_tells_of_memory_and_of_no_time(tmp_path):
    mode = next(mode for mode in MODES if mode.name == "offloaded, layer by layer, 4 bit")
    arguments = {
        "shape": "llama-2-7b",
        "base": "nf4",
        "lora_rank": 16,
        "batch_size": 4,
        "seq_len": 512,
        "device": "cuda",
    }
    told = {"setting": mode.config.to_dict(), "time": "2026-12-01T13", "device": "NVIDIA H200", "arguments": arguments}
    line = told | {"versions": {}, "dyn_mib": 2.0, "ms": 9.0}
    other = line | {"dyn_mib": 1.0, "ms": 5.0, "versions": {"flash-attn-4": "4"}}
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in (line, other)))
    assert times(Shape("llama-2-7b"), 4, 512, file) == {mode.name: "9 ms (H200)"}
    assert [one["dyn_mib"] for _, one in measured(file)] == [1.0]


def test_the_fastest_that_fits_is_chosen_once_times_are_known(roomy):
    """Exact slots of 1 % more time before quantized ones, and no mode that does not fit."""
    ms = {row.mode.name: 100.0 + i for i, row in enumerate(roomy.rows)}
    ms |= {
        "resident, CUDA graphs, 2 bit": 89.0,
        "resident, CUDA graphs, 4 bit": 89.9,
        "offloaded, CUDA graphs, 4 bit": 1,
    }
    rows = [replace(row, time=Time(ms[row.mode.name]), fits=ms[row.mode.name] > 1) for row in roomy.rows]
    found = replace(roomy, rows=rows)
    assert found.chosen is found.fastest and found.chosen.mode.name == "resident, CUDA graphs, 4 bit"
    assert found.chosen.tokens_per_second == pytest.approx(2048 / 0.0899)
    said = (
        "fastest: resident, CUDA graphs, 4 bit, HycloraConfig(q_bit=4, offload=False, cuda_graphs=True); 89.9 ms, 22781"
    )
    assert f" {said} real tokens/s least memory: " in " ".join(str(found).split())
    for text in (str(found), found.details()):
        assert re.search(r"\nresident, CUDA graphs, 4 bit .* 89.9 ms +22781\b", text)


@pytest.fixture
def few_modes(monkeypatch):
    """Two modes, and what would measure them: what it was asked for, and that the second has no room."""
    modes = [mode for mode in MODES if mode.name in ("exact, resident, layer by layer", "resident, CUDA graphs, 4 bit")]
    asked = []

    def measure_modes(bench, chosen, batch, tell):
        asked.append((bench.device.type, bench.lora, [mode.name for mode in chosen], batch))
        return {chosen[0].name: Time(50.0)} | {mode.name: Time(why="out of memory") for mode in chosen[1:]}

    monkeypatch.setattr("hyclora.utils.planning.plan.MODES", modes)
    monkeypatch.setattr("hyclora.utils.planning.plan.measure_modes", measure_modes)
    return asked


def test_what_fits_is_measured_with_such_adapters_and_rows(few_modes):
    options = {"lora_rank": 8, "target_modules": ["q_proj"], "lora_dropout": 0.1, "documents": 8}
    found = plan("llama-3.2-1b", "4GiB", "1GiB", (4, 512), measure=True, device="cpu", **options)
    adapters = LoraArguments(lora_rank=8, target_modules=["q_proj"], lora_dropout=0.1)
    assert few_modes == [("cpu", adapters, ["resident, CUDA graphs, 4 bit"], Batch(4, 512, 8))]
    assert [str(row.time) for row in found.rows] == ["50.0 ms", "unknown"] and not found.rows[1].fits
    assert found.timed.startswith("times are of CPU ")
    roomy = plan("llama-3.2-1b", "16GiB", "1GiB", measure=True, device="cpu")
    assert [str(row.time) for row in roomy.rows] == ["50.0 ms", "unknown: out of memory"]
    little = plan("llama-3.2-1b", "4GiB", "1GiB", (64, 4096), measure=True, device="cpu")
    assert little.timed == "times are unknown: no mode fits, so none was measured" and len(few_modes) == 2


def test_targets_may_be_written_as_for_the_drivers():
    """With spaces or commas in between."""
    apart, together = (
        plan("llama-3.2-1b", "16GiB", 0, target_modules=names) for names in (["q_proj", "k_proj"], ["q_proj,k_proj"])
    )
    assert [row.need for row in apart.rows] == [row.need for row in together.rows]


def test_times_are_kept_in_a_file_and_read(few_modes, tmp_path, capsys):
    command = [
        "llama-3.2-1b",
        "--gpu",
        "16GiB",
        "--host",
        "1GiB",
        "--device",
        "cpu",
        "--times",
        str(tmp_path / "t.json"),
    ]
    main([*command, "--measure"])
    measured = capsys.readouterr().out
    main(command)
    assert capsys.readouterr().out == measured and len(few_modes) == 1
    main([*command, "--tokens", "2x512"])
    assert "t.json has none of this model with such adapters and rows " in " ".join(capsys.readouterr().out.split())
    (tmp_path / "t.json").write_text("[")
    for options in ([], ["--measure"]):
        with pytest.raises(SystemExit) as exit:
            main([*command, *options])
        captured = capsys.readouterr()
        assert exit.value.code == 2 and captured.err.count("\n") == 1 and "t.json cannot be read" in captured.err
    assert len(few_modes) == 1


def test_a_full_disk_is_told_after_what_was_measured(few_modes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    command = "llama-3.2-1b --gpu 16GiB --host 0 --device cpu --measure --times".split()
    with pytest.raises(SystemExit) as exit:
        main([*command, str(tmp_path / "t.json")])
    said = capsys.readouterr()
    assert exit.value.code == 1 and "t.json (No space left on device): make room there or name another file" in said.err
    assert "fastest: " in said.out and "they are in" not in said.out


def test_a_gpu_that_is_not_the_one_planned_for_is_not_measured(few_modes, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA Small")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (0, 8 * 2**30))
    found = plan("llama-3.2-1b", "16GiB", "1GiB", measure=True)
    assert not few_modes and found.fastest is None and found.chosen
    assert found.timed == (
        "times are unknown: the plan is for 16.00 GiB of GPU memory, and the NVIDIA Small here has 8.00 GiB"
    )
    assert plan("llama-3.2-1b", "8.2GiB", "1GiB", measure=True).fastest  # a card has less than its name says
    assert few_modes[0][0] == "cuda"


def test_a_small_model_is_measured_on_a_cpu(tiny_llama_folder, few_modes, monkeypatch, tmp_path):
    """All of it, but for the clock's patience."""
    monkeypatch.setattr("hyclora.utils.planning.plan.measure_modes", measuring.measure_modes)
    monkeypatch.setattr(measuring, "WINDOW", 0.0)
    options = {"tokens": (2, 32), "base": "bf16", "device": "cpu", "times": tmp_path / "times.json"}
    found = plan(tiny_llama_folder, "4GiB", "1GiB", measure=True, **options)
    graphs, exact = found.rows
    assert str(graphs.time) == "unknown: runs on a GPU alone" and exact.time.ms > 0 and found.chosen is exact
    assert plan(tiny_llama_folder, "4GiB", "1GiB", **options).rows[1].time.ms == pytest.approx(exact.time.ms, abs=1e-3)


def test_how_near_a_count_is_said():
    assert Mode("", ()).accuracy == "no measured line"
    assert Mode("", (), lines=1, off=0.3).accuracy == "within 0.3 % of 1 measured line"
    far = Mode("", (), lines=2, off=NEAR + 5, earlier=True)
    assert far.accuracy == "2 measured lines of earlier builds differ by up to 15.0 %"


@pytest.mark.parametrize(
    "settings, checkpointing, said",
    [
        ({"layers": "input8"}, True, "checkpointing, resident layer inputs, CUDA graphs, 8 bit"),
        ({"cuda_graphs": False, "offload": True}, True, "checkpointing, offloaded layer inputs, exact"),
        (
            {"layers": "1*slots,input8", "cuda_graphs": False},
            True,
            "checkpointing, resident layer inputs, exact, layers=1*slots,input8",
        ),
        ({"layers": "input4", "layer_type": "baseline"}, False, "resident layer inputs, CUDA graphs, 4 bit"),
        ({"q_bit": "auto", "average_bits": 2.5}, False, "resident, CUDA graphs, 2.5 bit on average"),
    ],
)
def test_a_setting_is_called_by_what_it_keeps(settings, checkpointing, said):
    assert describe(HycloraConfig(**settings), checkpointing) == said


def test_modes_are_known_by_what_they_change():
    for mode in MODES:
        assert mode.checkpointing or mode_of(mode.config.to_dict()) is mode
    assert mode_of("PEFT LoRA") is None and mode_of({"q_bit": 4}) is None
    assert mode_of({"layer_type": "intra_inter_full_fuse", "slot_savers": {"lse": "exact"}}) is None


def test_a_budget_below_the_static_part():
    with pytest.raises(UserError, match=r"3.00 GiB of GPU memory is below the 4.91 GiB that weights"):
        plan("llama-2-7b", "3GiB", "64GiB")


@pytest.mark.parametrize(
    "options, said",
    [
        ({"documents": 3}, "3 documents do not fill 4 rows"),
        ({"documents": 2049}, "2049 documents are more than 4 x 512 tokens"),
        ({"lora_dropout": -1.0}, "lora_dropout must lie in"),
        ({"lora_dropout": float("nan")}, "lora_dropout must lie in"),
        ({"target_modules": ["q_proj", "v_prj"]}, "target_modules: .* no linear layer named v_prj"),
        ({"target_modules": ["all-linear", "q_proj"]}, "all-linear stands for all names"),
        ({"tokens": (0, 512)}, "tokens: '0x512' is no batch"),
        ({"tokens": 512}, "tokens: 512 is no batch"),
        ({"tokens": (4.0, 512)}, "tokens: '4.0x512' is no batch"),
        ({"tokens": (True, 512)}, "tokens: 'Truex512' is no batch"),
        ({"gpu": -5}, "gpu: -5 is no size of memory"),
        ({"gpu": float("nan")}, "gpu: nan is no size of memory"),
        ({"host": -5}, "host: -5 is no size of memory"),
        ({"host": True}, "host: True is no size of memory"),
        ({"lora_rank": True}, "lora_rank=True is no whole number"),
        ({"lora_rank": 1.5}, "lora_rank=1.5 is no whole number"),
        ({"documents": float("nan")}, "documents=nan is no whole number"),
        ({"documents": 4.5}, "documents=4.5 is no whole number"),
        ({"device": "cuda:1"}, "device='cuda:1' is none of cuda, cpu"),
        ({"lora_dropout": None}, "lora_dropout=None is no number"),
    ],
)
def test_what_no_run_could_be(options, said):
    with pytest.raises(UserError, match=said):
        plan("llama-2-7b", **{"gpu": "24GiB", "host": "64GiB"} | options)


def test_all_linear_is_a_name_for_all_layers():
    assert Shape("llama-3.2-1b", targets=["all-linear"]).trained == Shape("llama-3.2-1b").trained > 0


@pytest.mark.parametrize(
    "options, said",
    [
        (["nowhere", "--gpu", "24GiB", "--host", "1GiB"], "nowhere has no config.json"),
        (["llama-2-7b", "--gpu", "24", "--host", "1GiB"], "'24' is no size of memory"),
        (["llama-2-7b", "--gpu", "24GiB", "--host", "1Gib"], "'1Gib' is no size of memory"),
        (["llama-2-7b", "--gpu", "24GiB", "--host", "1GiB", "--tokens", "512"], "'512' is no batch"),
        (["llama-2-7b", "--gpu", "1GiB", "--host", "1GiB"], "is below the"),
        (["llama-2-7b", "--gpu", "24GiB"], "--host"),
        (["llama-2-7b", "--gpu", "24GiB", "--host", "1GiB", "--measure"], "or drop --measure (--device cpu"),
        (["llama-2-7b", "--gpu", "24GiB", "--host", "1GiB", "--device", "cuda"], "or drop --device cuda\n"),
        (["llama-2-7b", "--gpu", "24GiB", "--host", "1GiB", "--times", ""], "'' is no path"),
        (["llama-2-7b", "--gpu", "24GiB", "--host", "1GiB", "--times", "no.json"], "no.json has no times"),
        (["llama-2-7b", "--gpu", "24GiB", "--host", "1GiB", "--lora_rank", "x"], "--lora_rank"),
    ],
)
def test_mistakes_end_with_one_sentence(capsys, monkeypatch, options, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        main(options)
    captured = capsys.readouterr()
    assert exit.value.code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and said in captured.err


def test_a_batch_that_fits_in_no_mode(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["llama-2-7b", "--gpu", "6GiB", "--host", "1GiB", "--tokens", "64x4096"])
    captured = capsys.readouterr()
    assert exit.value.code == 1 and "no mode fits; the longest single row is" in captured.out
    assert captured.err.startswith("error: no mode fits this batch")
