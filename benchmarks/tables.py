"""A table in Markdown, and where its numbers come from."""

from hyclora.operators.attention.flash4 import PACKAGE

# of rows that are not of one run
SITTINGS = "*Commits differ where rows were measured in other sittings, on other cards of this kind.*"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(lines: list[dict], command: str) -> str:
    """Where the numbers of a table come from."""
    devices = sorted({line["device"] for line in lines})
    commits = sorted({(line["commit"] or "unknown")[:8] for line in lines})
    versions = [line["versions"] for line in lines]
    names = ("torch", "triton", "transformers", "peft")
    stack = " or ".join(dict.fromkeys(", ".join(f"{name} {of[name]}" for name in names) for of in versions))
    package = " or ".join(dict.fromkeys(of[PACKAGE] for of in versions if PACKAGE in of))
    if package:
        stack += f"; {PACKAGE} {package}{' in some rows' if any(PACKAGE not in of for of in versions) else ''}"
    return f"*{', '.join(devices)}; {stack}; commit {', '.join(commits)}; `{command}`.*"


def remarks(named: list[tuple[str, dict]]) -> list[str]:
    """What named lines say of themselves, once for all that say the same."""
    found = []
    for remark in dict.fromkeys(line["remark"] for _, line in named if "remark" in line):
        these = dict.fromkeys(name for name, line in named if line.get("remark") == remark)
        found.append(f"*{remark[0].upper()}{remark[1:]}: {'; '.join(these)}.*")
    return found
