"""A table in Markdown, and where its numbers come from."""


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(lines: list[dict], command: str) -> str:
    """Where the numbers of a table come from."""
    devices = sorted({line["device"] for line in lines})
    commits = sorted({(line["commit"] or "unknown")[:8] for line in lines})
    names = ("torch", "triton", "transformers", "peft")
    stacks = dict.fromkeys(", ".join(f"{name} {line['versions'][name]}" for name in names) for line in lines)
    stack = " or ".join(stacks)
    return f"*{', '.join(devices)}; {stack}; commit {', '.join(commits)}; `{command}`.*"
