"""The text of a file, and the rows of a JSON file: a list of objects, or one object a line.

A mistake is named by file and line or item.
"""

import gzip
import json
import zlib
from collections.abc import Callable
from pathlib import Path

from hyclora.utils.errors import UserError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# What rows and messages of other trainers have beside their texts: to leave it out is to train on something else
_UNREAD = ("tools", "tool_calls", "functions", "function_call", "system", "history", "reasoning_content", "thinking")
_UNREAD += ("weight", "chat_template_kwargs")
_WITHOUT_EFFECT = (None, "", [], {}, 1)


def read_rows(file: Path) -> list[tuple[str, dict]]:
    """(place, row) of every object in the file, of which there is at least one; place is what a message calls it.

    UserError for what is not UTF-8, not JSON or not an object.
    """
    text = read_text(file)
    if text.lstrip().startswith("["):
        rows = _items(text, file)
    elif _is_one_object(text):
        raise UserError(f"{file} is one JSON object: it needs a JSON list of objects, or one object a line")
    else:
        rows = _lines(text, file)
    if not rows:
        raise UserError(f"{file} is empty: it needs one JSON object a line, or a JSON list of objects")
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{place}: not a JSON object: correct or remove it")
    return rows


def read_each(file: Path, read: Callable[[str, dict], object]) -> list:
    """read(place, row) of every row; UserError for the first row that it refuses, and how many these are."""
    rows, found, mistakes = read_rows(file), [], []
    for place, row in rows:
        try:
            found.append(read(place, row))
        except UserError as mistake:
            mistakes.append(mistake)
    if mistakes:
        more = f" ({len(mistakes)} rows of {len(rows)} have mistakes)" if len(mistakes) > 1 else ""
        raise UserError(f"{mistakes[0]}{more}")
    return found


def read_text(file: Path) -> str:
    """The text of a file, .gz unpacked, less a byte order mark; UserError for what cannot be read and is not UTF-8.

    A zero is a character of UTF-8, but stands in files of other encodings, and where a torn one was never written.
    """
    try:
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    content = content.removeprefix(_BYTE_ORDER_MARK)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line}: not UTF-8: save the file with this encoding") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{file}:{line}: a zero character: the file is torn or not UTF-8, copy it again or save it so")
    return text


def _is_one_object(text: str) -> bool:
    """Whether it is written over several lines, none of which is one by itself."""
    try:
        return "\n" in text.strip() and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _lines(text: str, file: Path) -> list[tuple[str, object]]:
    # splitlines() would also split at characters that may stand inside a JSON string, such as U+2028
    places = [(f"{file}:{number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [(place, _parse(line, place)) for place, line in places]


def _items(text: str, file: Path) -> list[tuple[str, object]]:
    return [(f"{file}: item {number}", item) for number, item in enumerate(_parse(text, file), 1)]


def _parse(text: str, place: Path | str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        kind = "list" if isinstance(place, Path) else "object"
        raise UserError(f"{place}: not a JSON {kind} ({error}): correct or remove it") from None


def text_of(row: dict, key: str, place: str) -> str:
    """The text under a key; UserError if there is none."""
    if key not in row:
        raise UserError(f'{place}: the key "{key}" is missing, found {listed(row)}')
    text = row[key]
    if not isinstance(text, str):
        raise UserError(f'{place}: the value of "{key}" is not a text but {json.dumps(text)[:40]}')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f'{place}: the value of "{key}" holds half a character (a lone surrogate)') from None
    return text


def response_of(row: dict, key: str, place: str) -> str:
    """The text under a key; UserError if there is nothing to learn in it."""
    text = text_of(row, key, place)
    if not text.strip():
        raise UserError(f'{place}: the response under "{key}" is empty: write or remove it')
    return text


def refuse_unread(row: dict, place: str) -> None:
    """UserError if a row or message has what is meant to be learned, and no format here has a place for."""
    for key in _UNREAD:
        if row.get(key) not in _WITHOUT_EFFECT:
            raise UserError(f'{place}: "{key}" would not be trained on: write it into the texts, or remove it')


def listed(row: dict) -> str:
    """The keys of a row for a message."""
    return "the keys " + ", ".join(row) if row else "no keys"
