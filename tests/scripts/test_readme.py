"""README.md and benchmarks/README.md say what the tree and the result files say, and what they tell to type works."""

import re
import shlex

import pytest

from benchmarks.report import PARTS, ROOT, render
from hyclora.utils import checks
from hyclora.utils.args import Parser, parse_arguments
from hyclora.utils.runs.script import settings_of
from tests.helpers.drivers import DEFAULTS, GROUPS

FILES = [*PARTS, ROOT / "CONTRIBUTING.md"]
TEXT = "".join(file.read_text(encoding="utf-8") for file in FILES)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("file", PARTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_generated_parts_are_current(file):
    """Every part is there once, and `python -m benchmarks.report` would change nothing."""
    text = file.read_text(encoding="utf-8")
    assert all(text.count(f"<!-- {name} -->") == text.count(f"<!-- end {name} -->") == 1 for name in PARTS[file])
    assert render(file) == text, "run python -m benchmarks.report"


def test_python_snippets_run(tmp_path, monkeypatch, capsys):
    """One after the other, as a reader would type them, but on rows of 24 tokens for 128."""
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt/tiny-llama").symlink_to(ROOT / "ckpt/tiny-llama")
    monkeypatch.chdir(tmp_path)
    names, snippets = {}, [re.sub(r"\b4, 128\)", "4, 24)", snippet) for snippet in blocks("python")]
    assert "".join(snippets).count("4, 24)") == 2
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert len(snippets) > 1 and "patched 5 layers" in capsys.readouterr().out
    adapters = [p for name, p in names["model"].named_parameters() if "lora_B" in name]
    assert adapters and all(p.grad is not None and p.grad.isfinite().all() for p in adapters)
    assert {"adapter_model.safetensors", "hyclora_calibration.safetensors"} <= {
        file.name for file in (tmp_path / "ckpt/my-adapters").iterdir()
    }


def test_commands_of_the_scripts_are_understood(monkeypatch, tmp_path):
    """Their variables are settings of the script, and values and options are parsed as on a machine with a GPU."""
    monkeypatch.setattr(checks, "NEED_GPU", {})
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.chdir(tmp_path)
    for name in ("my_rows.jsonl", "my_text.txt"):
        (tmp_path / name).touch()
    (tmp_path / "my_texts").mkdir()
    text, setting = "\n".join(blocks("bash")), r"\w+=(?:'[^']*'|\S+) "
    commands = re.findall(rf"^((?:{setting})*)bash (run_\w+\.sh)([^#\n]*)", text, re.MULTILINE)
    assert len(commands) == text.count("bash run_") > 5
    for given, script, options in commands:
        driver = script.removesuffix(".sh")
        if driver not in GROUPS:
            continue
        settings, argv = settings_of(ROOT / script), shlex.split(options)
        for variable in shlex.split(given):
            name, _, value = variable.partition("=")
            assert name in settings, f"{script} has no {name}"
            argv += [f"--{name}", value]
        parse_arguments(argv, GROUPS[driver], DEFAULTS[driver])


def test_scripts_that_take_one_gpu_are_named():
    (sentence,) = re.findall(r"^Several GPUs of one machine, [^:]*:", README, re.MULTILINE)
    alone = [f"{driver}.sh" for driver in GROUPS if "num_gpus" not in settings_of(ROOT / f"{driver}.sh")]
    assert re.findall(r"`(run_\w+\.sh)`", sentence) == alone


def test_named_files_exist():
    named = set(re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`|bash (\w+\.sh)|\]\((?:\.\./)?([\w./-]+)(?:#[\w-]+)?\)", TEXT))
    paths = {path for found in named for path in found if path}
    generated = {f"exp_results_{driver.removeprefix('run_')}/" for driver in GROUPS} | {"ckpt/smollm2-135m"}
    assert len(paths) > 10
    assert [path for path in paths - generated if not (ROOT / path).exists()] == []


def test_links_into_a_page_have_their_heading():
    for path, anchor in re.findall(r"\]\(([\w./]+)#([\w-]+)\)", README):
        headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {heading.lower().replace(" ", "-") for heading in headings}


def test_named_options_exist():
    """Each option is one of a driver's or of a script that is run as a module."""
    known = {
        option for groups in GROUPS.values() for action in Parser(groups)._actions for option in action.option_strings
    }
    scripts = "".join(
        file.read_text() for folder in ("benchmarks", "ckpt", "hyclora") for file in (ROOT / folder).glob("*.py")
    )
    known |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', scripts)) | {"--help"}
    named = set(re.findall(r"--[a-z][\w-]*\w", TEXT))
    assert named and named <= known


def test_named_modules_exist():
    named = set(re.findall(r"python -m ([\w.]+)", TEXT))
    assert named and all((ROOT / (name.replace(".", "/") + ".py")).is_file() for name in named)


def test_the_versions_that_it_asks_for_are_those_of_the_package():
    needed = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    for name in ("torch", "triton", "transformers", "peft"):
        assert f"{name} {needed[name]}" in README
