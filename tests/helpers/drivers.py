"""Every driver of the repository root, with the groups of its command line."""

from importlib import import_module

from hyclora.utils.args import ROOT


def _groups_of(name: str) -> tuple:
    module = import_module(name)
    return module.DRIVER.groups if hasattr(module, "DRIVER") else module.GROUPS


GROUPS = {file.stem: _groups_of(file.stem) for file in sorted(ROOT.glob("run_*.py"))}
