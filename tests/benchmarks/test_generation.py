"""benchmarks.generation on a small model on the CPU: what it records, and its table."""

import json

import pytest

from benchmarks import generation, report_generation, rows


@pytest.fixture
def lines(tiny_llama_folder, tmp_path):
    """Of one row and of five, which are longer and shorter."""
    options = ["--model", str(tiny_llama_folder), "--device", "cpu", "--output_dir", str(tmp_path)]
    generation.main([*options, "--batches", "1", "5", "--new", "6"])
    return [json.loads(line) for line in (tmp_path / "generation.jsonl").read_text().splitlines()]


def test_both_ways_write_the_same(lines):
    assert [line["arguments"]["rows"] for line in lines] == [1, 5]
    assert [(line["tokens"], line["alike"]) for line in lines] == [(6, 6), (30, 30)]
    for line in lines:
        assert line["with"]["cache_mib"] > 0 == line["without"]["cache_mib"]
        assert line["with"]["seconds"] > 0 and line["without"]["seconds"] > 0


def test_the_table_has_lines_of_a_gpu(lines, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    assert report_generation.generation() == ""
    for line in lines:
        line["arguments"]["device"] = "cuda"
        line |= {"with": {"seconds": 1.0, "cache_mib": 2.0, "peak_mib": 3.0}, "remark": "a busy host"}
        line |= {"without": {"seconds": 2.5, "cache_mib": 0, "peak_mib": 4.0}}
    (tmp_path / "generation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = report_generation.generation()
    assert "float32, 5 x 6 tokens | 30 of 30 | 1.00 | 2.50 | 2.50x | 2.0 | 3.0 | 4.0 |" in told
    assert "*A busy host: " in told


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(tiny_llama_folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        generation.main(
            ["--model", str(tiny_llama_folder), "--device", "cpu", "--output_dir", str(tmp_path / "file"), "--new", "2"]
        )
    said = capsys.readouterr()
    assert ended.value.code == 2 and "file cannot be written" in said.err and "tokens alike" not in said.out


def test_a_gpu_is_needed(tiny_llama_folder, capsys, monkeypatch):
    monkeypatch.setattr(generation.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        generation.main(["--model", str(tiny_llama_folder)])
    assert ended.value.code == 2 and "it needs a GPU (or --device cpu)" in capsys.readouterr().err
