"""What is alive at the peak, from an allocator's trace."""

import pytest

from benchmarks import peak_memory
from benchmarks.peak_memory import at_peak, place
from hyclora.utils.args import ROOT


def frame(file, line=1, name="f"):
    return {"filename": str(ROOT / file), "line": line, "name": name}


def event(action, addr, size=0, file="operators/a.py"):
    return {"action": action, "addr": addr, "size": size, "frames": [frame(file)]}


def test_a_place_is_of_the_project():
    inner, outer = frame(".venv/torch/x.py"), frame("operators/linear/lora.py", 9, "frozen")
    assert place([inner, outer, frame("models/blocks.py", 5, "run")]) == "lora.py:9 frozen < blocks.py:5 run"
    assert place([inner]) == "x.py:1 f" and place([]) == "unknown"


def test_the_peak_is_of_what_lives_at_one_time():
    """An address that is used again is another allocation; what was there before does not count."""
    peak, alive, most = at_peak([
        event("free_completed", 9), event("alloc", 1, 40), event("alloc", 2, 50, "models/b.py"),
        event("free_requested", 1), event("free_completed", 1), event("alloc", 1, 60), event("free_completed", 1),
        event("alloc", 3, 30, "models/b.py"), event("free_completed", 2),
    ])  # fmt: skip
    assert peak == 110 and sorted(e["size"] for e in alive) == [50, 60]
    assert most == {"a.py:1 f": 110, "b.py:1 f": 90}


def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as stopped:
        peak_memory.main(["--device", "cpu", "--shape", str(ROOT / "ckpt/tiny-llama")])
    assert stopped.value.code and "GPU" in capsys.readouterr().err
