"""The table of the longest row a card: ours beside what is published of Unsloth."""

from benchmarks import rows
from benchmarks.paper_tables import published
from benchmarks.record import read
from benchmarks.rows import describe_device, describe_model, on_gpus
from benchmarks.tables import source, table

NAME = "longest_rows"
OF = ("llama-3-8b", "nf4", 32)  # what was published of: shape, base, rank
HEAD = [
    "tokens of one row", "mode", "layers run", "GPU GiB", "host GiB", "seconds for them", "Unsloth, published", "of it",
]  # fmt: skip


def longest_rows() -> str:
    """A table a GPU and shape, the GPU measured last first; published cards stand there whether measured or not."""
    groups: dict[tuple, list[dict]] = {}
    for line in on_gpus(read(rows.RESULTS / f"{NAME}.jsonl")):
        cell = line["device"], *(line["arguments"][name] for name in ("shape", "base", "lora_rank"))
        groups.setdefault(cell, []).append(line)
    if not any(cell[1:] == OF for cell in groups):
        groups = {("", *OF): [], **groups}
    return "\n\n".join(one_table(cell, lines) for cell, lines in groups.items())


def one_table(cell: tuple, lines: list[dict]) -> str:
    """A card's rows, beside the published one."""
    theirs = published_tokens() if cell[1:] == OF else {}
    found, shown = [], []
    for card in sorted(theirs | {line["card_gib"]: 0 for line in lines}):
        best = best_of([line for line in lines if line["card_gib"] == card])
        shown += best
        for line in best or [None]:
            ours, other = tokens_that_fit(line) if line else 0, theirs.get(card)
            said = columns(line) if line else [""] * 6
            found.append([f"{card} GiB", *said, str(other or ""), f"{ours / other:.1f}x" if ours and other else ""])
    title = f"{describe_device(cell)}, {describe_model(cell)}" if lines else describe_model(cell)
    told = [source(shown, f"python -m benchmarks.{NAME}")] if shown else []
    return "\n\n".join([table([title, *HEAD], found), *told])


def best_of(lines: list[dict]) -> list[dict]:
    """The longest row that fits at full depth, and that of fewer layers if it is longer; if none fits the last one."""
    kinds = [[line for line in lines if is_whole(line) is whole and line["fits"]] for whole in (True, False)]
    whole, part = (max(kind, key=tokens_that_fit, default=None) for kind in kinds)
    if whole and part and tokens_that_fit(part) <= tokens_that_fit(whole):
        part = None
    return [line for line in (whole, part) if line] or lines[-1:]


def is_whole(line: dict) -> bool:
    return line["predicted"]["layers"] == line["full"]["layers"]


def published_tokens() -> dict[int, int]:
    """By card."""
    found = {key[2]: value for key, value in published().items() if key[0] == NAME}
    return {int(card.removesuffix(" GB")): int(tokens) for card, tokens in found.items()}


def columns(line: dict) -> list[str]:
    """Memory is that of all layers: what was measured, and what is counted for those that were not run."""
    tokens, layers = line["arguments"]["seq_len"], f"{line['predicted']['layers']} of {line['full']['layers']}"
    if not line["fits"]:
        failed = f"{line['mode']}: {tokens} tokens, {line['measured']['error'].replace('|', '/')}"
        return ["", failed, layers, "", "", ""]
    rest = {name: line["full"][name] - line["predicted"][name] for name in ("static_mib", "held_mib", "host_mib")}
    gpu = line["reserved_mib"] + rest["static_mib"] + rest["held_mib"]
    host = line["measured"]["host_mib"] + rest["host_mib"]
    sizes = [f"{size / 1024:.1f}" for size in (gpu, host)]
    return [str(tokens), line["mode"], layers, *sizes, f"{line['seconds']:.1f}"]


def tokens_that_fit(line: dict) -> int:
    return line["arguments"]["seq_len"] if line["fits"] else 0
