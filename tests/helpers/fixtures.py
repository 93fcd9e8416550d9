"""Fixtures that several test files share."""

import os
import signal

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: it decides how kernels are built

import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hyclora.models.blocks import AttentionBlock
from hyclora.models.layers import WholeLayer
from hyclora.operators import dispatch
from hyclora.utils.data.gsm8k import prompt_of, target_of
from hyclora.utils.data.word_problems import word_problems
from tests.helpers.interpreter import hasten
from tests.helpers.kernel_checks import refuse_bfloat16, refuse_wide_masks
from tests.helpers.replaying import record

if not torch.cuda.is_available():
    hasten()

# torch.device notes once which functions allocate: the true ones, before kernels() replaces some of them for a while
with torch.device("cpu"):
    torch.empty(0)

# a shell's background job ignores Ctrl-C, and so would all that the tests start and stop by it
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def cpu_runs_reference(monkeypatch):
    """CPU tensors run plain torch, as they do outside of the tests, unless a test asks for the kernels."""
    monkeypatch.setattr(dispatch, "INTERPRETING", False)


@pytest.fixture(autouse=True)
def products_of_its_own(monkeypatch):
    """TF32 that a test switches on, as the Trainer does for torch_compile, is off again for the tests after it.

    Its products have 1e-3 of error, and fp32 is compared within 1e-5.
    """
    monkeypatch.setattr(torch.backends, "fp32_precision", torch.backends.fp32_precision)


@pytest.fixture
def kernels(monkeypatch):
    """CPU tensors run the Triton kernels in the interpreter, and torch.empty is full of NaN (bytes of 0xFF)."""
    monkeypatch.setattr(dispatch, "INTERPRETING", not torch.cuda.is_available())
    if dispatch.INTERPRETING:
        refuse_bfloat16(monkeypatch)
        refuse_wide_masks(monkeypatch)

    def poison(allocate):
        def poisoned(*args, **kwargs):
            t = allocate(*args, **kwargs)
            return t.fill_(float("nan") if t.is_floating_point() else 255 if t.dtype == torch.uint8 else -1)

        return poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


@pytest.fixture
def deterministic_attention():
    """Attention whose backward adds in a fixed order, so that gradients can be compared bit for bit on a GPU."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture
def recorded():
    """tests.helpers.replaying.record()."""
    return record()


@pytest.fixture
def any_dtype(monkeypatch):
    """A GPU's kernel takes half precision alone; so that rows of fp32 go through all the rest."""
    if torch.cuda.is_available():
        monkeypatch.setattr(AttentionBlock, "takes_starts", lambda *_: True)


@pytest.fixture
def shapes(monkeypatch) -> list[tuple]:
    """Of batch and row, what the layers get."""
    found, run = [], WholeLayer.forward

    def forward(block, hidden, *args, **kwargs):
        found.append(tuple(hidden.shape[:2]))
        return run(block, hidden, *args, **kwargs)

    monkeypatch.setattr(WholeLayer, "forward", forward)
    return found


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory):
    """A LLaMA of two layers with random weights and a byte-level BPE tokenizer, as a checkpoint folder."""
    folder = tmp_path_factory.mktemp("ckpt") / "random-llama"
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    texts = [prompt_of(row["question"]) + target_of(row["answer"]) for row in word_problems(50, 0)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
