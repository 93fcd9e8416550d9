"""download_datasets.sh on a table of small files: in files of this machine, and from a server of this machine."""

import functools
import hashlib
import http.server
import os
import re
import shutil
import subprocess
import threading
import zipfile

import pytest

from hyclora.utils.args import ROOT

TABLE = "utils/data/datasets.tsv"
HEADER = (ROOT / TABLE).read_text().splitlines()[0]


def test_the_script_says_how_much_there_is_to_fetch():
    """Of one file it is not known."""
    rows = [line.split("\t") for line in (ROOT / TABLE).read_text().splitlines()[1:]]
    known = [(row[0], int(row[1]) / 1e6) for row in rows if row[1] != "-"]
    said = re.search(r"all: (\d+) MB, of which GLUE's MNLI has (\d+)", (ROOT / "download_datasets.sh").read_text())
    total, mnli = map(int, said.groups())
    assert sum(size for _, size in known) < total < 1.02 * sum(size for _, size in known)
    assert mnli == round(dict(known)["glue/MNLI/"])


@pytest.fixture
def upstream(tmp_path):
    """A folder of what is fetched, and the script beside a table of it."""
    shutil.copy(ROOT / "download_datasets.sh", tmp_path)
    (tmp_path / "utils/data").mkdir(parents=True)
    source = tmp_path / "upstream"
    source.mkdir()
    (source / "train.jsonl").write_text('{"question": "1 + 1?"}\n' * 300)
    (source / "test.jsonl").write_text("short\n")
    with zipfile.ZipFile(source / "RTE-clean.zip", "w") as archive:
        archive.writestr("RTE/train.tsv", "a\tb\n")
        archive.writestr("RTE/original/notes.txt", "c")
        archive.writestr("__MACOSX/RTE/._train.tsv", "d")
    return source


@pytest.fixture
def download(tmp_path, upstream):
    """Run the script with the table of (path, file upstream, changed fields); exit code and what it says."""

    def run(*options, base=None, rows=None, **environment):
        lines = [HEADER]
        for path, name, *changed in rows or ROWS:
            content = (upstream / name).read_bytes() if (upstream / name).is_file() else b""
            size, digest = [*changed, str(len(content)), hashlib.sha256(content).hexdigest()][:2]
            lines.append("\t".join([path, size, digest, f"{base or upstream.as_uri()}/{name}"]))
        (tmp_path / TABLE).write_text("\n".join(lines) + "\n")
        command = ["bash", tmp_path / "download_datasets.sh", *options]
        done = subprocess.run(
            command, cwd="/", env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout, done.stderr

    return run


ROWS = [
    ("gsm8k/train.jsonl", "train.jsonl"),
    ("gsm8k/test.jsonl", "test.jsonl"),
    ("glue/RTE/", "RTE-clean.zip"),
]


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_files_come_to_their_places_once(download, tmp_path, upstream):
    code, said, _ = download()
    assert code == 0 and said.count("fetched ") == 3 and said.endswith(f"all there: {tmp_path / 'data'}\n")
    there = ["glue/RTE/.RTE-clean.zip", "glue/RTE/original/notes.txt", "glue/RTE/train.tsv"]
    assert files_of(tmp_path / "data") == [*there, "gsm8k/test.jsonl", "gsm8k/train.jsonl"]
    assert (tmp_path / "data/gsm8k/train.jsonl").read_bytes() == (upstream / "train.jsonl").read_bytes()
    for options in ([], ["--check"]):
        code, said, _ = download(*options, base="http://127.0.0.1:9")
        assert code == 0 and said.count("there    ") == 3


def test_some_can_be_asked_for_and_another_folder(download, tmp_path):
    code, _, _ = download("glue/RTE", data_dir=str(tmp_path / "elsewhere"))
    assert code == 0 and not (tmp_path / "data").exists()
    assert "glue/RTE/train.tsv" in files_of(tmp_path / "elsewhere")
    assert download("gsm8k")[0] == 0
    assert files_of(tmp_path / "data") == ["gsm8k/test.jsonl", "gsm8k/train.jsonl"]


@pytest.mark.parametrize(
    "changed, said", [(("7",), "has 6 bytes instead of 7"), (("-", "0" * 64), "has another sha256 than 000")]
)
def test_a_file_that_is_another_is_not_kept(download, tmp_path, changed, said):
    rows = [("gsm8k/test.jsonl", "test.jsonl", *changed), ("gsm8k/train.jsonl", "train.jsonl", "-", "-")]
    code, out, error = download(rows=rows)
    assert code == 1 and f"FAILED   gsm8k/test.jsonl {said}" in out and "1 files are not in" in error
    assert files_of(tmp_path / "data") == ["gsm8k/train.jsonl"]


def test_a_changed_file_is_named_and_left_alone(download, tmp_path):
    download("gsm8k")
    (tmp_path / "data/gsm8k/test.jsonl").write_text("mine, and longer\n")
    code, out, _ = download("gsm8k")
    assert code == 1 and "test.jsonl has 17 bytes instead of 6: remove it, and start again" in out
    assert (tmp_path / "data/gsm8k/test.jsonl").read_text() == "mine, and longer\n"


def test_without_a_network_it_says_what_to_bring_where(download, tmp_path):
    code, out, error = download(base="http://127.0.0.1:9", rows=[*ROWS, ("gsm8k/more.jsonl", "more.jsonl")])
    assert code == 1 and error.count("curl: (7)") <= 4  # a host that cannot be reached is asked once
    assert "Without a network here, fetch these elsewhere" in out
    assert f"http://127.0.0.1:9/RTE-clean.zip  ->  {tmp_path / 'data'}/glue/RTE/" in out
    assert "4 files are not in" in error


def test_archives_that_were_brought_by_hand_are_unpacked(download, tmp_path, upstream):
    (tmp_path / "data/glue/RTE").mkdir(parents=True)
    shutil.copy(upstream / "RTE-clean.zip", tmp_path / "data/glue/RTE")
    code, _, _ = download("glue", base="http://127.0.0.1:9")
    assert code == 0
    assert files_of(tmp_path / "data/glue/RTE") == [".RTE-clean.zip", "original/notes.txt", "train.tsv"]


def test_checking_uses_no_network_and_writes_nothing(download, tmp_path):
    code, out, error = download("--check", base="http://127.0.0.1:9")
    assert code == 1 and out.count("missing ") == 3 and "curl" not in error and not (tmp_path / "data").exists()


class Server(http.server.SimpleHTTPRequestHandler):
    """Goes on in the middle of a file if `ranges`; `asked` has what was asked for."""

    ranges, asked = True, []

    def do_GET(self):
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.asked.append(int(start[1]) if start else 0)
        content = open(self.translate_path(self.path), "rb").read()
        if start and self.ranges:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start[1]}-{len(content) - 1}/{len(content)}")
            content = content[int(start[1]) :]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_file_goes_on(download, tmp_path, upstream, ranges):
    handler = type("Handler", (Server,), {"ranges": ranges, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(upstream)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        whole = (upstream / "train.jsonl").read_bytes()
        (tmp_path / "data/gsm8k").mkdir(parents=True)
        (tmp_path / "data/gsm8k/train.jsonl.part").write_bytes(whole[:1000])
        code, _, _ = download(base=f"http://127.0.0.1:{server.server_port}", rows=ROWS[:1], no_proxy="*")
    finally:
        server.shutdown()
    assert code == 0 and (tmp_path / "data/gsm8k/train.jsonl").read_bytes() == whole
    assert handler.asked == ([1000] if ranges else [1000, 0])


def test_mrpc_is_split_by_its_ids(download, tmp_path, upstream):
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    lines = [header, '1\t10\t11\tHe said " a\tb', "0\t11\t10\tc\td", "1\t12\t13\te\tf"]
    (upstream / "pairs.txt").write_bytes("\r\n".join([*lines, ""]).encode())
    (upstream / "ids.tsv").write_text("11\t10\n")
    rows = [("glue/MRPC/dev_ids.tsv", "ids.tsv"), ("glue/MRPC/msr_paraphrase_train.txt", "pairs.txt")]
    assert download("glue/MRPC", rows=rows)[0] == 0
    folder = tmp_path / "data/glue/MRPC"
    assert (folder / "dev.tsv").read_text() == "\n".join([header, lines[2], ""])
    assert (folder / "train.tsv").read_text() == "\n".join([header, lines[1], lines[3], ""])


@pytest.mark.parametrize(
    "options, said",
    [
        (["gsm9k"], "unknown data set gsm9k: there are gsm8k, arithmetic, wikitext-2 and glue"),
        (["gsm"], "unknown data set gsm"),
        (["--force"], "unknown option --force"),
    ],
)
def test_mistakes_are_refused(download, tmp_path, options, said):
    code, out, error = download(*options)
    assert code == 2 and error.startswith(f"error: {said}") and error.count("\n") == 1 and out == ""
    assert not (tmp_path / "data").exists()


def test_the_table_is_whole():
    header, *rows = [line.split("\t") for line in (ROOT / TABLE).read_text().splitlines()]
    assert header == ["path", "bytes", "sha256", "url"] and len(rows) > 20
    for path, size, digest, url in rows:
        assert size == "-" or int(size) > 0
        assert re.fullmatch(r"[0-9a-f]{64}", digest) and url.startswith("https://")
        assert path.endswith("/") == url.endswith(".zip")
    assert len({(path, url) for path, _, _, url in rows}) == len(rows)
