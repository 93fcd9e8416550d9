"""The command that started this process: read again for near misses, and written out again for the user to repeat.

A shell script of the repository root tells its name in HYCLORA_SCRIPT and, quoted for a shell, the options that it puts
in front of the user's own in HYCLORA_PASSED (`start` of utils/env.sh). Its settings are lower-case variables with a
default, `seed=${seed:-11}`, in itself or in utils/settings.sh, which it may source.
"""

import difflib
import os
import re
import shlex
import sys
from pathlib import Path

SCRIPT, PASSED = "HYCLORA_SCRIPT", "HYCLORA_PASSED"
PROGRAM = "HYCLORA_PROGRAM"  # the module of a driver that another program runs (benchmarks/workers.py)
LAUNCHED = "HYCLORA_LAUNCHED"  # in the processes that num_gpus has started (utils/runs/launch.py)
_VARIABLE = re.compile(r"^\s*(\w+)=\$\{\1:?-", re.MULTILINE)
_SOURCED = re.compile(r'^source "\$root/(.+)"$', re.MULTILINE)
_NEAR, _ALIKE = 0.85, 0.8  # of what may be for something else; of what cannot


def settings_of(script: Path) -> list[str]:
    """The names of a script's settings; those of the files that it sources are as much its own."""
    text = script.read_text(encoding="utf-8")
    files = [script.parent / name for name in _SOURCED.findall(text)]
    texts = [text, *(file.read_text(encoding="utf-8") for file in files if file.is_file())]
    return list(dict.fromkeys(name for text in texts for name in _VARIABLE.findall(text)))


def _script() -> tuple[str, list[str]]:
    """Path and settings of the shell script; '' and none without one."""
    path = os.environ.get(SCRIPT, "")
    return (path, settings_of(Path(path))) if Path(path).is_file() else ("", [])


def check_environment(options: list[str]) -> None:
    """ValueError for an exported variable that was meant as a setting of the script: misspelled, or an option only."""
    path, variables = _script()
    if not variables:
        return
    for name in sorted(os.environ.keys() - set(variables)):
        if name != name.lower() or not os.environ[name]:
            continue
        given = f"{name} in the environment is not a setting of {Path(path).name}"
        if near := difflib.get_close_matches(name, variables, n=1, cutoff=_NEAR):
            raise ValueError(f"{given}: did you mean {near[0]}? (unset {name} if it is for something else)")
        if "_" in name and f"--{name}" in options:
            raise ValueError(f"{given}, but an option: bash {path} --{name} VALUE (and unset {name})")


def nearest_options(word: str, options: list[str]) -> list[str]:
    """What may be meant by an option that there is not: at most four of which it is a part, or else the most alike one.

    --data-name and --data_name are the same one.
    """
    name = word.partition("=")[0].strip("-").replace("-", "_")
    names = [option[2:] for option in options if "-" not in option[2:]]
    around = [option for option in names if len(name) > 2 and f"_{name}_" in f"_{option}_"]
    return [f"--{option}" for option in around[:4] or difflib.get_close_matches(name, names, n=1, cutoff=_ALIKE)]


def again(argv: list[str] | None, *options) -> str:
    """The command of this process with `options` (name, value, ...) in place of those that it was given."""
    added = [str(word) for word in options]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and LAUNCHED not in os.environ:
        return " ".join(["your command", *(["with", shlex.join(added)] if added else [])])
    words = list(sys.argv[1:] if argv is None else argv)
    path, variables = _script()
    passed = shlex.split(os.environ.get(PASSED, ""))
    if passed and words[: len(passed)] == passed:
        given = [f"{name}={shlex.quote(os.environ[name])}" for name in variables if name in os.environ]
        start, words = [*given, "bash", shlex.quote(path)], words[len(passed) :]
    else:
        start = ["python", *_program()]
    return " ".join([*start, shlex.join([*_without(words, ["--resume_from_checkpoint", *added[::2]]), *added])]).strip()


def _program() -> list[str]:
    """What python is to run."""
    if driver := os.environ.get(PROGRAM):
        return ["-m", driver] if "." in driver else [f"{driver}.py"]
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return ["-m", module.name] if module else [shlex.quote(sys.argv[0])]


def _without(words: list[str], names: list[str]) -> list[str]:
    """The words less the options `names`, each written as `--name value` or `--name=value`."""
    kept, dropped, alone = [], False, False  # of the last option: whether it goes, and whether its value is in its word
    for word in words:
        name, equals, _ = word.partition("=")
        if name.startswith("--"):
            dropped, alone = f"--{name[2:].replace('-', '_')}" in names, bool(equals)
        if not dropped or alone and not word.startswith("--"):
            kept.append(word)
    return kept
