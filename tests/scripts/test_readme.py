"""README.md says what the tree and the result files say."""

import re

from benchmarks.report import PARTS, README, ROOT, render
from hyclora.utils.args import GROUPS, Parser


def test_generated_parts_are_current():
    """Every part is there once, and `python -m benchmarks.report` would change nothing."""
    text = README.read_text(encoding="utf-8")
    assert all(text.count(f"<!-- {name} -->") == text.count(f"<!-- end {name} -->") == 1 for name in PARTS)
    assert render(text) == text, "run python -m benchmarks.report"


def test_named_files_exist():
    text = README.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[\w-]+/)+[\w.-]*)`|bash (\w+\.sh)|\]\((figures/\S+)\)", text))
    paths = {path for found in named for path in found if path}
    generated = {"exp_results_gsm8k/"}
    assert len(paths) > 5
    assert [path for path in paths - generated if not (ROOT / path).exists()] == []


def test_named_options_exist():
    """Each option is one of the driver's or of a script that is run as a module."""
    known = {option for action in Parser(GROUPS)._actions for option in action.option_strings}
    scripts = "".join(file.read_text() for folder in ("benchmarks", "ckpt") for file in (ROOT / folder).glob("*.py"))
    known |= set(re.findall(r'add_argument\(\s*"(--\w+)"', scripts)) | {"--help"}
    named = set(re.findall(r"--[a-z]\w+", README.read_text(encoding="utf-8")))
    assert named and named <= known


def test_named_modules_exist():
    named = set(re.findall(r"python -m ([\w.]+)", README.read_text(encoding="utf-8")))
    assert named and all((ROOT / (name.replace(".", "/") + ".py")).is_file() for name in named)
