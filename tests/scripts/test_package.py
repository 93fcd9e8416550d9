"""The package: what is in it, what it needs, and that it gets on with a user's own models, operators and utils."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest

from hyclora.utils.args import ROOT

PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PARTS = ("models", "operators", "utils")
USE = """
import hyclora, sys
assert "torch" not in sys.modules
import models, operators, utils
from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.models.families import FAMILIES
from hyclora.operators.packing import quantize
from hyclora.utils.args import parse_arguments
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), LoraConfig(target_modules=["q_proj", "up_proj"]))
print(apply_hyclora(model, HycloraConfig(q_bit=4)))
ids = torch.arange(8)[None]
model.train()(input_ids=ids, labels=ids).loss.backward()
remove_hyclora(model)
print(models.MINE, operators.MINE, utils.MINE, hyclora.__file__)
"""


def sources():
    command = ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return [ROOT / name for name in listed if (ROOT / name).is_file()] or sorted(ROOT.rglob("*.py"))


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_part_has_one_name():
    """A part imported as `models` too would be there twice, with two of each class."""
    wrong = []
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            wrong += [(file.name, name) for name in names if name.partition(".")[0] in PARTS]
    assert len(sources()) > 100 and not wrong


def test_all_folders_are_packaged():
    folders = {file.parent for part in PARTS for file in (ROOT / part).rglob("*.py")}
    wanted = {"hyclora", *(".".join(["hyclora", *folder.relative_to(ROOT).parts]) for folder in folders)}
    listed = re.search(r"^packages = \[(.*?)\]", PROJECT, re.MULTILINE | re.DOTALL)[1]
    assert set(re.findall(r'"(.*?)"', listed)) == wanted
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_the_package_imports_what_it_brings():
    """Each packaged module, as soon as it is imported: what extras bring is asked for where it is used."""
    needs = re.search(r"^dependencies = \[(.*?)^\]", PROJECT, re.MULTILINE | re.DOTALL)[1]
    theirs = [line for line in importlib.metadata.requires("transformers") if "extra ==" not in line]
    brought = set(re.findall(r'"([\w-]+)', needs)) | {re.match(r"[\w-]+", line)[0] for line in theirs}
    brought = {name.replace("-", "_") for name in brought} | {*sys.stdlib_module_names, "hyclora"}
    missing = []
    for file in [file for part in ("hyclora", *PARTS) for file in (ROOT / part).rglob("*.py")]:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            missing += [(file.name, name) for name in names if name.partition(".")[0] not in brought]
    assert len(brought) > 100 and not missing


def rooms():
    """Folders that hold more than tests, and what their docstrings have to name: files, and the rooms inside."""
    modules = [file for file in sources() if not file.name.startswith(("test_", "__init__"))]
    folders = {file.parent for file in modules if (file.parent / "__init__.py").is_file()}
    for folder in sorted(folders):
        inside = {f"{room.name}/" for room in folder.iterdir() if (room / "__init__.py").is_file()}
        yield folder, {file.name for file in modules if file.parent == folder} | inside


@pytest.mark.parametrize("folder, names", list(rooms()), ids=lambda value: getattr(value, "name", ""))
def test_a_room_says_what_is_in_it(folder, names):
    """Each file and room inside is named in the docstring of the folder, and nothing that is not there."""
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    named = re.findall(r"(?<![\w./])[\w/]+(?:\.py\b|/(?!\w))", text)
    assert not names - set(named)
    assert not [name for name in named if not (folder / name).exists() and not (ROOT / name).exists()]


def test_pins_are_of_what_is_needed():
    """requirements.txt pins what pyproject.toml names, all of it and nothing else, at an allowed version."""
    least = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', PROJECT))
    least.pop("setuptools")
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().split())
    assert pins.keys() == least.keys()

    def numbers(version):
        return [int(n) for n in version.split(".")]

    assert all(numbers(pins[name]) >= numbers(least[name]) for name in pins)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the tree, and the wheel and the sdist made of it without a network."""
    folder = tmp_path_factory.mktemp("dist")
    tree = folder / "tree"
    for file in [*sources(), ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"]:
        place = tree / file.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
    build = "from setuptools import build_meta as b; print(b.build_wheel({0!r})); print(b.build_sdist({0!r}))"
    names = run(sys.executable, "-c", build.format(str(folder)), cwd=tree).split()
    return folder / next(n for n in names if n.endswith(".whl")), folder / next(n for n in names if n.endswith(".gz"))


def test_wheel_and_sdist_hold_the_parts_under_one_name(built):
    wheel, sdist = built
    modules = {file.relative_to(ROOT).as_posix() for part in PARTS for file in (ROOT / part).rglob("*.py")}
    with zipfile.ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if name.endswith(".py")}
    own = {file.relative_to(ROOT).as_posix() for file in (ROOT / "hyclora").glob("*.py")}
    assert packed == own | {f"hyclora/{name}" for name in modules} and "hyclora/fidelity.py" in own
    with tarfile.open(sdist) as file:
        shipped = {name.partition("/")[2] for name in file.getnames()}
    assert modules | own | {"pyproject.toml", "LICENSE"} <= shipped


def test_it_works_beside_foreign_packages_of_the_same_names(built, tmp_path):
    """In an environment of its own, in a folder with a utils.py, a models/ and an operators/ of the user's."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built[0])
    # torch and its friends are those of the environment that runs the tests
    paths = [path for path in sys.path if path.endswith("-packages")]
    (tmp_path / "friends.pth").write_text("\n".join(paths))
    os.replace(tmp_path / "friends.pth", f"{site}/friends.pth")
    work = tmp_path / "work"
    for name in ("models/__init__.py", "operators/__init__.py", "utils.py"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("MINE = 'mine'\n")
    (work / "train.py").write_text(USE)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said = run(python, "train.py", cwd=work, env=environment)
    assert "patched 1 layers" in said and f"mine mine mine {site}" in said
