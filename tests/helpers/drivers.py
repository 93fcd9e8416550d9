"""Every driver of the repository root, with the groups of its command line and its own defaults; and a run of one."""

from importlib import import_module

from hyclora.utils.args import ROOT

_MODULES = {file.stem: import_module(file.stem) for file in sorted(ROOT.glob("run_*.py"))}
GROUPS = {
    name: module.DRIVER.groups if hasattr(module, "DRIVER") else module.GROUPS for name, module in _MODULES.items()
}
DEFAULTS = {name: module.DRIVER.all_defaults if hasattr(module, "DRIVER") else {} for name, module in _MODULES.items()}


def run_script(main, options, capsys) -> tuple[int, str]:
    """Run a script with options: its exit code, and what it printed. A mistake is told in one sentence."""
    code = 0
    try:
        main([*map(str, options)])
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == (code != 0) and "Traceback" not in captured.err
    return code, captured.out + captured.err
