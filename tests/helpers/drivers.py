"""Every driver of the repository root, with the groups of its command line and its own defaults."""

from importlib import import_module

from hyclora.utils.args import ROOT

_MODULES = {file.stem: import_module(file.stem) for file in sorted(ROOT.glob("run_*.py"))}
GROUPS = {
    name: module.DRIVER.groups if hasattr(module, "DRIVER") else module.GROUPS for name, module in _MODULES.items()
}
DEFAULTS = {name: module.DRIVER.all_defaults if hasattr(module, "DRIVER") else {} for name, module in _MODULES.items()}
