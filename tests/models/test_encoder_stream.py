"""RoBERTa's batches as one row of their real tokens, whose layers are replayed: the same numbers as in stock."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import RobertaConfig, RobertaForQuestionAnswering

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.models import patch as patch_module
from hyclora.models.graphs.sizes import filled_size
from hyclora.models.patch import find_patch
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.offloading import equal
from tests.helpers.replaying import CALIBRATION, Rerun, config, graphed, nothing_around, replayed, train
from tests.helpers.small_models import gradients, largest_error, roberta
from tests.models.test_stream import half, ragged

pytestmark = pytest.mark.usefixtures("any_dtype")
BASELINE = {"layer_type": "baseline", "stream": True, "cuda_graphs": False}
TASKS = ("masked", "classification", "tokens")


def sentences(seed: int, task="classification", side="right", **options) -> dict:
    """Ragged rows; some are empty, unless a class of each is asked for."""
    batch = ragged(seed, side=side, **options)
    labels = batch["labels"]
    if task == "classification":
        batch["attention_mask"][:, 0 if side == "right" else -1] = 1
        return batch | {"labels": torch.arange(len(labels), device=DEVICE) % 3}
    return batch | {"labels": torch.where(labels < 0, labels, labels % 3) if task == "tokens" else labels}


def real_tokens(batch: dict) -> int:
    return int(batch["attention_mask"].sum())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("task", TASKS)
def test_ragged_rows_equal_stock(task, side, implementation, shapes):
    """Loss and gradients, those of a head that PEFT saves whole too; the layers see as many tokens as there are."""
    if (task, side) == ("classification", "left"):
        pytest.skip("the head reads padding: test_padding_that_a_classifier_reads")
    model = roberta(task=task, attn_implementation=implementation)
    batches = [sentences(seed, task, side) for seed in range(5)]
    expected = [gradients(model, batch) for batch in batches]
    apply_hyclora(model, HycloraConfig(**BASELINE))
    for batch, (loss, exact) in zip(batches, expected, strict=True):
        shapes.clear()
        our_loss, ours = gradients(model, batch)
        assert task == "masked" or any("classifier" in name for name in ours)
        assert abs(our_loss - loss) < 1e-5 and largest_error(ours, exact) < 1e-5
        assert set(shapes) == {(1, real_tokens(batch))}


@pytest.mark.parametrize("task", TASKS)
def test_rows_of_up_to_512_tokens(task, shapes):
    model, batch = roberta(task=task, max_position_embeddings=520), sentences(3, task, rows=5, longest=512)
    loss, exact = gradients(model, batch)
    apply_hyclora(model, HycloraConfig(**BASELINE))
    our_loss, ours = gradients(model, batch)
    assert abs(our_loss - loss) < 1e-5 and largest_error(ours, exact) < 1e-5
    assert set(shapes) == {(1, real_tokens(batch))}


def left(batch):
    """The first token of a row, which the head reads, is padding then."""
    return sentences(0, side="left")


def empty(batch):
    batch["attention_mask"][1] = 0
    return batch


@pytest.mark.parametrize("change", [left, empty])
def test_padding_that_a_classifier_reads(change, shapes):
    model, batch = roberta(task="classification"), change(sentences(0))
    loss, exact = gradients(model, batch)
    apply_hyclora(model, HycloraConfig(**BASELINE))
    our_loss, ours = gradients(model, batch)
    assert abs(our_loss - loss) < 1e-5 and largest_error(ours, exact) < 1e-5
    assert set(shapes) == {(4, 33)}


def embedded(batch, model):
    ids = batch.pop("input_ids")
    return batch | {"inputs_embeds": model.get_input_embeddings()(ids).detach()}


VARIANTS = {
    "two kinds of tokens": lambda b, _: b | {"token_type_ids": (b["input_ids"] > 50).long()},
    "of all rows": lambda b, _: b | {"token_type_ids": torch.arange(33, device=DEVICE)[None] // 20},
    "position ids": lambda b, _: b | {"position_ids": torch.arange(33, device=DEVICE)[None] + 5},
    "embeddings": embedded,
    "gaps": lambda b, _: b | {"attention_mask": b["attention_mask"] * (torch.arange(33, device=DEVICE) % 5 != 2)},
    "a count of the trainer's": lambda b, _: b | {"num_items_in_batch": torch.tensor(4, device=DEVICE)},
    "a tuple": lambda b, _: b | {"return_dict": False},
}


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS)
def test_ways_to_call(change, shapes):
    model = roberta(task="classification", type_vocab_size=2)
    batch = change(sentences(0), model)

    def run():
        model.zero_grad()
        loss = model(**batch)[0]
        loss.backward()
        named = [(n, p) for n, p in model.named_parameters() if p.grad is not None]
        return loss.item(), {n: p.grad.clone() for n, p in named}

    loss, exact = run()
    apply_hyclora(model, HycloraConfig(**BASELINE))
    our_loss, ours = run()
    assert our_loss == pytest.approx(loss, abs=1e-5) and largest_error(ours, exact) < 1e-5
    assert set(shapes) == {(1, real_tokens(batch))}


def body(model):
    return model.get_base_model().roberta


def watch(path: str):
    return lambda model: model.get_base_model().get_submodule(path).register_forward_hook(lambda *_: None)


class MeanOfRow(nn.Module):
    """A head that reads all tokens, padding too."""

    def forward(self, hidden):
        return hidden.mean(1)[:, :3]


LOOKING = {
    **{path: watch(path) for path in ("roberta", "roberta.encoder", "roberta.encoder.layer.0", "roberta.embeddings")},
    **{path: watch(path) for path in ("roberta.embeddings.position_embeddings", "classifier")},
    "before layers": lambda m: body(m).encoder.register_forward_pre_hook(lambda *_: None),
    "another head": lambda m: setattr(m.get_base_model(), "classifier", MeanOfRow()),
    "another encoder": lambda m: setattr(body(m).encoder, "forward", body(m).encoder.forward),
}


@pytest.mark.parametrize("look", LOOKING.values(), ids=LOOKING)
def test_who_looks_sees_the_batch(look, shapes):
    model, batch = roberta(task="classification"), sentences(1)
    apply_hyclora(model, HycloraConfig(**BASELINE))
    gradients(model, batch)
    assert shapes.pop()[0] == 1
    look(model)
    shapes.clear()
    _, found = gradients(model, batch)
    assert set(shapes) == {(4, 33)}
    remove_hyclora(model)
    assert largest_error(found, gradients(model, batch)[1]) < 1e-5


def test_labels_of_padding_are_read(shapes):
    model, batch = roberta(task="tokens"), sentences(0, "tokens")
    batch["labels"].fill_(1)
    loss, exact = gradients(model, batch)
    apply_hyclora(model, HycloraConfig(**BASELINE))
    our_loss, ours = gradients(model, batch)
    assert abs(our_loss - loss) < 1e-5 and largest_error(ours, exact) < 1e-5
    assert set(shapes) == {(4, 33)}


def test_outputs_have_the_batchs_shape():
    """Logits of real tokens are stock's; those of padding are the head's of zeros."""
    model, batch = roberta(task="tokens"), sentences(0, "tokens")
    real, expected = batch["attention_mask"].bool(), model(**batch).logits
    apply_hyclora(model, HycloraConfig(**BASELINE))
    logits = model(**batch).logits
    torch.testing.assert_close(logits[real], expected[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        logits[~real], model.get_base_model().classifier(logits.new_zeros(1, 96)).expand_as(logits[~real])
    )
    hidden = model(**batch, output_hidden_states=True).hidden_states
    assert len(hidden) == 3 and hidden[1].shape[:2] == real.shape


def as_one_row(batch: dict, model) -> dict:
    """What stock code is to be called with to get a stream: real tokens, each seeing those of its row."""
    real = batch["attention_mask"].bool()
    rows = real.nonzero()[:, 0]
    embeddings = body(model).embeddings
    positions = embeddings.create_position_ids_from_input_ids(batch["input_ids"], embeddings.padding_idx)
    return {
        "input_ids": batch["input_ids"][real][None], "labels": batch["labels"][real][None],
        "position_ids": positions[real][None], "attention_mask": (rows[:, None] == rows)[None, None],
    }  # fmt: skip


def test_dropout_is_that_of_the_row():
    """Stock code with the same masks, called with the row, has the same loss and gradients."""
    layers = ["query", "key", "value", "intermediate.dense", "output.dense"]  # not the head's, which sees the batch
    model = roberta({"lora_dropout": 0.1, "target_modules": layers}, hidden_dropout_prob=0.2)
    batch = sentences(0, "masked")
    loss, exact = gradients(model, as_one_row(batch, model))
    assert loss != gradients(model, as_one_row(batch, model), seed=2)[0]
    apply_hyclora(model, HycloraConfig(**BASELINE))
    our_loss, ours = gradients(model, batch)
    assert abs(our_loss - loss) < 1e-5 and largest_error(ours, exact) < 1e-5


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's kernel for rows of many lengths does not drop")
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_attention_drops_the_same_in_backward(checkpointing, shapes):
    """The slope of the loss along a direction is what the gradients say, with all that drops."""
    drops = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.1}
    model, batch = roberta({"lora_dropout": 0.1}, task="classification", **drops).double(), sentences(0)
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()
    apply_hyclora(model, HycloraConfig(**BASELINE))
    _, found = gradients(model, batch)
    assert shapes[-1] == (1, real_tokens(batch))
    draw = torch.Generator().manual_seed(0)
    named = {n: p for n, p in model.named_parameters() if n in found}
    step = {n: 1e-5 * torch.randn(p.shape, generator=draw, dtype=p.dtype) for n, p in named.items()}
    losses = []
    for sign in (1, -2):
        for name, p in named.items():
            p.data += sign * step[name]
        losses.append(gradients(model, batch)[0])
    slope = sum((step[n] * found[n]).sum() for n in step).item()
    assert (losses[0] - losses[1]) / 2 == pytest.approx(slope, rel=1e-5)


@pytest.mark.usefixtures("deterministic_attention")
@pytest.mark.parametrize("options", [{"q_bit": 8}, {"q_bit": 8, "layer_type": "intra"}], ids=str)
def test_packed_slots_of_the_row(options):
    """Near those of the batch; of one row alone, bit for bit what comes of it without padding."""
    model = roberta(task="classification")
    batches = [sentences(seed) for seed in range(CALIBRATION + 1)]
    expected = [gradients(model, batch)[1] for batch in batches][-1]
    apply_hyclora(model, config(stream=True, cuda_graphs=False, **options))
    found = [gradients(model, batch)[1] for batch in batches][-1]
    assert largest_error(found, expected) < 0.02
    alone = {name: t[:1] for name, t in batches[0].items()}
    n = real_tokens(alone)
    alone["attention_mask"] = (torch.arange(33, device=DEVICE) < n)[None].long()
    bare = {name: t if name == "labels" else t[:, :n] for name, t in alone.items()}
    assert equal(*(gradients(model, batch)[1] for batch in (alone, bare)))


DROPS = ({"lora_dropout": 0.1}, {"hidden_dropout_prob": 0.2})


@pytest.mark.parametrize("lora, drops", [({}, {}), DROPS], ids=["", "dropout"])
@pytest.mark.parametrize("task, offload", [("classification", True), ("tokens", False), ("masked", True)])
def test_one_recording_serves_many_batches(task, offload, lora, drops):
    """Bit for bit what the layers give one by one, whatever rows there are; batches are of many lengths."""
    stock = half(roberta(lora, task=task, **drops))
    ours = copy.deepcopy(stock)
    apply_hyclora(stock, config(stream=True, cuda_graphs=False))
    graphs = graphed(ours, {"stream": True}, offload, recorder=Rerun())
    steps = [sentences(seed, task) for seed in range(12)]
    find_patch(stock).add_graphs(None)  # it fills rows up too
    find_patch(stock).graphs._possible = lambda: False
    found = []
    for model in (stock, ours):
        torch.manual_seed(7)
        found.append(train(model, steps))
    sizes = {filled_size(real_tokens(batch)) for batch in steps[CALIBRATION:]}
    assert 1 <= len(graphs.recordings) <= len(sizes) < len(set(map(real_tokens, steps)))
    assert all(equal(a, b) for a, b in zip(*found, strict=True))
    assert replayed(ours, graphs, steps[-1])


@pytest.mark.parametrize("layer_type", ["baseline", "intra_inter", "intra_inter_full_fuse"])
def test_replays_of_one_shape(layer_type):
    """Rows without padding, with the stand-in that repeats operations on the same memory as a graph does."""
    stock = half(roberta(*DROPS[:1], task="classification", **DROPS[1]))
    ours = copy.deepcopy(stock)
    apply_hyclora(stock, config(layer_type=layer_type))
    graphs = graphed(ours, {"layer_type": layer_type})
    steps = [sentences(seed) for seed in range(CALIBRATION + 5)]
    for batch in steps:
        batch["attention_mask"].fill_(1)
    found = []
    for model in (stock, ours):
        torch.manual_seed(7)
        found.append(train(model, steps, zero_every=3))
    assert len(graphs.recordings) == 1 and replayed(ours, graphs, steps[0])
    assert all(equal(a, b) for a, b in zip(*found, strict=True))


def test_what_a_recording_depends_on():
    """Dropout of hidden states, where the bias of a norm is, and hooks: none is replayed as it was."""
    model = half(roberta(task="classification", hidden_dropout_prob=0.2))
    body(model).embeddings.dropout.p = 0.0  # torch's own, of as many tokens as there are
    graphs, batch = graphed(model, {"stream": True}, recorder=Rerun()), sentences(0)
    layer = body(model).encoder.layer[-1]
    nn.init.normal_(model.get_base_model().classifier.modules_to_save["default"].out_proj.weight)  # so that it shows

    def loss():
        torch.manual_seed(7)
        return train(model, [batch])[0]["loss"]

    train(model, [batch] * (CALIBRATION + 2))
    assert replayed(model, graphs, batch) and len(graphs.recordings) == 1
    found = [loss()]
    for change in (
        lambda: setattr(layer.output.dropout, "p", 0.0),
        lambda: setattr(layer.output.LayerNorm.bias, "data", torch.randn_like(layer.output.LayerNorm.bias)),
    ):
        change()
        train(model, [batch])  # what is so for the first time runs layer by layer
        found.append(loss())
        with graphs.paused():
            torch.testing.assert_close(found[-1], loss(), atol=1e-2 if DEVICE == "cuda" else 1e-5, rtol=0)
        assert abs(found[-1] - found[-2]) > 0.05
    assert len(graphs.recordings) == 3
    handle = layer.attention.register_forward_hook(lambda *_: None)
    assert not replayed(model, graphs, batch)
    handle.remove()
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": nothing_around})
    assert not replayed(model, graphs, batch)


def test_what_is_said(monkeypatch):
    """Of a head that may read padding, and of attention that drops."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    model = get_peft_model(RobertaForQuestionAnswering(RobertaConfig(**sizes)), LoraConfig(target_modules=["query"]))
    assert "stream: off, it is not known what RobertaForQuestionAnswering reads" in str(apply_hyclora(model))
    monkeypatch.setattr(patch_module, "_elsewhere", lambda layers: None)
    settings = HycloraConfig(cuda_graphs=False)
    text = str(apply_hyclora(roberta(task="classification", attention_probs_dropout_prob=0.1), settings))
    assert "attention dropout is 0.1, which the kernel for rows of many lengths cannot do" in text
    text = str(apply_hyclora(roberta(task="classification"), settings))
    assert "attention dropout" not in text and "stream: off" not in text
