"""Instruction data of the user: a JSON file, or a folder with train.jsonl and optionally test.jsonl.

The format of a file is told by the keys of its rows. A prompt is taken as it is written; instructions, and chats for a
tokenizer without a chat template, are written under headings, an empty input left out:

    Task:           System:
    {instruction}   {content}

    Input:          User:
    {input}         {content}

    Answer:         Assistant:
    {output}        {content}

Each response ends with the eos token.
"""

from collections.abc import Callable
from pathlib import Path

from hyclora.utils.args import DataArguments
from hyclora.utils.data.files import listed, read_each, read_rows, refuse_unread, response_of, text_of
from hyclora.utils.data.gsm8k import prompt_of, target_of
from hyclora.utils.data.tokens import Example
from hyclora.utils.errors import UserError

ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}


def under_headings(parts: list[tuple[str, str]], answer: str) -> str:
    """The prompt of (heading, text) parts, up to the heading of the answer."""
    return "".join(f"{heading}:\n{text}\n\n" for heading, text in parts) + f"{answer}:\n"


def _as_written(row: dict, keys: tuple[str, str], place: str) -> Example:
    return Example([(text_of(row, keys[0], place), response_of(row, keys[1], place))])


def _word_problem(row: dict, keys: tuple[str, str], place: str) -> Example:
    return Example([(prompt_of(text_of(row, keys[0], place)), target_of(response_of(row, keys[1], place)))])


def _instruction(row: dict, keys: tuple[str, str], place: str) -> Example:
    parts = [("Task", text_of(row, keys[0], place))]
    if row.get("input") is not None and text_of(row, "input", place):
        parts.append(("Input", row["input"]))
    return Example([(under_headings(parts, "Answer"), response_of(row, keys[1], place))])


def _chat(row: dict, keys: tuple[str], place: str) -> Example:
    (key,) = keys
    if not isinstance(row[key], list):
        raise UserError(f'{place}: the value of "{key}" is not a list of objects with role and content')
    exchanges, told, ends = [], [], 0
    for number, message in enumerate(row[key], 1):
        at = f"{place}: message {number}"
        if not isinstance(message, dict):
            raise UserError(f"{at} is not an object with role and content")
        refuse_unread(message, at)
        role = text_of(message, "role", at)
        if role not in ROLES:
            raise UserError(f'{at}: the role "{role}" is unknown, known are {", ".join(ROLES)}')
        if role == "assistant":
            exchanges.append((under_headings(told, ROLES[role]), response_of(message, "content", at)))
            told, ends = [], number
        else:
            told.append((ROLES[role], text_of(message, "content", at)))
    if not exchanges:
        raise UserError(f"{place}: no message has the role assistant: there is nothing to learn")
    messages = [{name: message[name] for name in ("role", "content")} for message in row[key][:ends]]
    return Example(exchanges, messages, place)


FORMATS: dict[tuple[str, ...], Callable[[dict, tuple, str], Example]] = {
    ("prompt", "response"): _as_written,
    ("prompt", "completion"): _as_written,
    ("instruction", "output"): _instruction,
    ("messages",): _chat,
    ("question", "answer"): _word_problem,
}


def load_examples(args: DataArguments, split: str) -> list[Example]:
    """The examples of a split ("train" or "test"); none without a test file. UserError names the first mistaken row."""
    file = _file_of(Path(args.data_dir), split)
    if file is None:
        return []
    place, row = read_rows(file)[0]
    first = _format_of(row, place)

    def read(place: str, row: dict) -> Example:
        keys = _format_of(row, place, first)
        if keys != first:
            raise UserError(f"{place}: a row of {_named(keys)} in a file of {_named(first)}: use one format a file")
        refuse_unread(row, place)
        return FORMATS[keys](row, keys, place)

    examples = read_each(file, read)
    return examples[: args.max_train_samples if split == "train" else args.max_eval_samples]


def _file_of(path: Path, split: str) -> Path | None:
    if not path.exists():
        raise UserError(f"data_dir {path} does not exist: name a file or a folder")
    if path.is_file():
        return path if split == "train" else None
    files = [file for suffix in ("jsonl", "json") if (file := path / f"{split}.{suffix}").is_file()]
    if len(files) > 1:
        raise UserError(f"{files[0]} and {files[1].name} are both there: keep one of them")
    if not files and split == "train":
        raise UserError(f"{path} has no train.jsonl: put it there, or name a file with --data_dir")
    return files[0] if files else None


def _format_of(row: dict, place: str, expected: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The keys of the one format that the row fits."""
    fitting = [keys for keys in FORMATS if row.keys() >= set(keys)]
    if len(fitting) > 1:
        raise UserError(f"{place}: a row of {' and of '.join(map(_named, fitting))}: remove the keys of all but one")
    if fitting:
        return fitting[0]
    nearest = max(FORMATS, key=lambda keys: (len(row.keys() & set(keys)), keys == expected))
    if not row.keys() & set(nearest):
        raise UserError(f"{place}: a row needs the keys {', or '.join(map(_named, FORMATS))}, found {listed(row)}")
    missing = next(key for key in nearest if key not in row)
    raise UserError(f'{place}: the key "{missing}" is missing, found {listed(row)}')


def _named(keys: tuple[str, ...]) -> str:
    return " and ".join(keys)
