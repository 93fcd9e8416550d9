"""What a training run needs of GPU and host memory, counted before it begins: no weight is loaded, no kernel runs.

Times alone are measured, and only where they are asked for.

shape.py    a model's linear layers, slots and trained tensors      live.py     what is alive at the peak of a step
modes.py    the settings that a plan weighs, and how near it is     need.py     that in all, with the allocator's gaps
fitting.py  the largest micro-step of a run, and whether it fits    budget.py   what a memory budget chooses
recorded.py result lines of a checkout: measured memory and time    units.py    24GiB and 4x512 as numbers
peers.py    what PEFT alone and Unsloth need, to compare with       times.py    of a step, from those of a few layers
measuring.py    a few layers of each mode, on the device at hand    times_file.py   what was measured, in a file
kept.py     what each layer keeps, by the savers that it would get   plan.py     the rows of hyclora/plan.py
telling.py  how they are told
"""

from importlib import import_module

_PUBLIC = {
    "MODES": "modes",
    "Mode": "modes",
    "Need": "need",
    "Savers": "kept",
    "Shape": "shape",
    "count": "live",
    "mode_of": "modes",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    """The names of all, imported when they are asked for: who reads a size off a command line loads no torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
