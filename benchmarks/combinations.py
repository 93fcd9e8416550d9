"""What people combine, and what they mistype: the tests of each, run on this machine and counted.

    python -m benchmarks.combinations                        # some ten minutes on two CPU cores
    python -m benchmarks.combinations --match TRL --jobs 4
    FUZZ_SECONDS=120 python -m benchmarks.combinations --match input

Each is some of the project's tests, named by file or by file::test. Appends a line a combination to
OUTPUT_DIR/combinations.jsonl: how many of its tests passed, were skipped and failed, the names of those that failed,
and how many inputs were drawn where a test draws them. Exit code 1 if any failed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.jobs import number
from benchmarks.record import RESULTS, record
from hyclora.utils.args import ROOT
from hyclora.utils.disk import check_output, to_path
from hyclora.utils.errors import UserError, entry_point

NAME = "combinations"
COMBINATIONS = {
    "TRL's trainers: SFT, DPO, KTO, reward, GRPO, RLOO, ORPO, CPO": ("models/test_trl.py",),
    "gradient checkpointing of both kinds, recorded or not": (
        "models/graphs/test_kept_inputs.py::test_gradient_checkpointing_is_replayed",
        "models/test_blocks.py::test_gradient_checkpointing_gives_the_same_gradients",
        "models/families/test_families.py::test_gradient_checkpointing_gives_the_same_gradients",
        "models/test_late_mlp.py::test_checkpointing_of_hugging_face",
    ),
    "kinds of adapters: ranks and alphas by pattern, some layers, trained tokens, rsLoRA, biases": (
        "models/test_combinations.py::test_adapters_of_all_kinds",
    ),
    "norms, embeddings and heads trained whole (modules_to_save)": ("models/test_whole_modules.py",),
    "tokens added, embeddings resized or in host memory": (
        "models/test_combinations.py::test_tokens_that_are_added_to_a_patched_model",
        "models/test_host_embedding.py",
    ),
    "two adapters, merging, adapters off, adapters saved and loaded": (
        "models/test_switches.py",
        "models/test_combinations.py::test_adapters_saved_by_a_patched_model_are_peft_s",
    ),
    "two models in a process; copies, pickles and other processes": (
        "models/test_combinations.py::test_two_models_in_one_process",
        "models/test_copies.py",
    ),
    "generating, evaluating and averaging in callbacks between steps": (
        "models/test_combinations.py::test_what_a_callback_does_between_steps_changes_no_gradient",
        "models/test_callback.py",
    ),
    "8-bit and paged Adam, LoRA+, and other optimizers": ("models/test_combinations.py::test_optimizers",),
    "preference losses and reference passes of one's own": (
        "models/test_combinations.py::test_losses_of_preferences",
        "models/test_combinations.py::test_a_reference_before_the_backward_of_a_replay",
    ),
    "DDP and FSDP2 of two processes, Accelerate and HF's Trainer": (
        "scripts/test_distributed.py",
        "scripts/test_fsdp2.py",
        "models/test_fsdp_trainer.py",
        "models/test_fully_shard.py",
    ),
    "hooks, modules and functions that somebody has replaced": ("models/test_stranger_code.py", "models/test_watch.py"),
    "NaN and infinity; rows without targets, of one token, all padding": (
        "models/test_finite.py",
        "models/test_edge_inputs.py",
    ),
    "mistyped input: options, data files and model folders": (
        "scripts/test_bad_input.py",
        "scripts/test_fuzz.py",
        "utils/data/test_hostile_files.py",
    ),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", default="", help="only combinations whose name has this in it")
    parser.add_argument("--jobs", type=number(1), default=os.cpu_count(), help="tests at a time")
    parser.add_argument("--output_dir", type=to_path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)
    missing = [name for name in ("pytest", "xdist", "pytest_timeout") if find_spec(name) is None]
    if missing:
        raise UserError(f"tests need {', '.join(missing)}: pip install pytest pytest-xdist pytest-timeout")
    return args


def run(tests: list[str], jobs: int, report: Path) -> None:
    """Run tests, with a JUnit report; UserError if pytest did not come to run them."""
    places = [str(ROOT / "tests" / test) for test in tests]
    options = ["-q", "-p", "no:cacheprovider", "-n", str(jobs), "--dist", "worksteal", f"--junitxml={report}"]
    ended = subprocess.run([sys.executable, "-m", "pytest", *options, *places], cwd=ROOT, check=False)
    if ended.returncode not in (0, 1) or not report.exists():
        raise UserError(f"the tests did not come to their end (code {ended.returncode}), see above")


def found(report: Path) -> list[ElementTree.Element]:
    return list(ElementTree.parse(report).getroot().iter("testcase"))


def is_of(case: ElementTree.Element, test: str) -> bool:
    """Whether a test case is one of file, or of file::test with whatever parameters."""
    file, _, name = test.partition("::")
    within = case.get("classname") == "tests." + file.removesuffix(".py").replace("/", ".")
    return within and (not name or case.get("name").partition("[")[0] == name)


def outcome(case: ElementTree.Element) -> str:
    kinds = {child.tag for child in case}
    return "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"


def count(cases: list[ElementTree.Element], tests: tuple[str, ...]) -> dict:
    """What came of those cases that are of these tests."""
    own = [case for case in cases if any(is_of(case, test) for test in tests)]
    counted = Counter(map(outcome, own))
    line = {kind: counted[kind] for kind in ("passed", "skipped", "failed")}
    line["names"] = [f"{case.get('classname')}::{case.get('name')}" for case in own if outcome(case) == "failed"]
    drawn = [p.get("value") for case in own for p in case.iter("property") if p.get("name") == "drawn"]
    return line | ({"drawn": sum(map(int, drawn))} if drawn else {})


@entry_point
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    chosen = {name: tests for name, tests in COMBINATIONS.items() if args.match in name}
    if not chosen:
        raise UserError(f"--match {args.match!r} is in no name: there are {'; '.join(COMBINATIONS)}")
    check_output(args.output_dir)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        run([test for tests in chosen.values() for test in tests], args.jobs, report)
        cases = found(report)
    failed = 0
    for name, tests in chosen.items():
        found_here = {"setting": name, **count(cases, tests), "arguments": {"tests": list(tests)}}
        line = record(NAME, found_here, args.output_dir)
        failed += line["failed"]
        print(f"{name}: {line['passed']} passed, {line['skipped']} skipped, {line['failed']} failed", flush=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
