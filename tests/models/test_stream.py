"""Padded and packed batches as one row of their real tokens: the same numbers, and nothing computed for padding."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from hyclora import HycloraConfig, apply_hyclora
from hyclora.models.graphs.sizes import filled_size
from hyclora.models.head import HeadBlock
from hyclora.models.layers import LayerBlock
from hyclora.models.patch import find_patch
from hyclora.models.stream import Stream
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.offloading import equal
from tests.helpers.replaying import CALIBRATION, Rerun, config, graphed, nothing_around, train
from tests.helpers.small_models import gradients, largest_error, llama, mistral, padded_batch, qwen2, qwen3

FAMILIES = {"llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3}
pytestmark = pytest.mark.usefixtures("any_dtype")
BASELINE = {"layer_type": "baseline", "stream": True, "cuda_graphs": False}


def ragged(seed: int, rows=4, longest=33, side="right", packed=False) -> dict:
    """Rows of random lengths, some of them empty, with labels on part of them; or packed into one."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (rows,), generator=draw)
    lengths[int(torch.randint(0, rows, (1,), generator=draw))] = longest
    ids = torch.randint(0, 128, (rows, longest), generator=draw)
    mask = torch.arange(longest) < lengths[:, None]
    if packed:
        documents = [n for n in lengths.tolist() if n]
        positions = torch.cat([torch.arange(n) for n in documents])[None]
        labels = ids[mask][None].masked_fill(positions == 0, -100)
        batch = {"input_ids": ids[mask][None], "position_ids": positions, "labels": labels, "use_cache": False}
        return {name: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for name, t in batch.items()}
    if side == "left":
        mask = mask.flip(1)
    unlabelled = torch.rand(ids.shape, generator=draw) < 0.4
    unlabelled[:, 1:] |= mask[:, 1:] & ~mask[:, :-1]  # the first token after padding is foretold from padding
    labels = ids.masked_fill(~mask | unlabelled, -100)
    return {k: t.to(DEVICE) for k, t in {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}.items()}


def test_a_row_and_back():
    real = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    bounds = torch.tensor([[[[0, 2, 4, 8, 12], [0, 1, 1, 1, 0]]]], dtype=torch.int32)
    stream = Stream(bounds, real, torch.device(DEVICE), lambda n, k: (filled_size(n), 64))
    x = torch.arange(24.0, device=DEVICE).view(3, 4, 2)
    row = stream.gather(x)
    assert row.shape == (1, 64, 2)
    torch.testing.assert_close(row[0, :5], x[real.to(DEVICE)])
    torch.testing.assert_close(stream.scatter(row), x * real.to(DEVICE)[..., None])
    assert stream.starts.shape == (1, 65, 1, 1)
    assert stream.starts[0, :5, 0, 0].tolist() == [0, 2, 5, 64, 64] and stream.mask.sum() == 5
    assert stream.places[real.flatten().to(DEVICE)].tolist() == list(range(5))
    exact = Stream(bounds, real, torch.device(DEVICE))
    assert exact.mask is None and exact.gather(x).shape == (1, 5, 2)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_ragged_rows_equal_stock(family, side, shapes):
    """Loss and gradients of random rows; the layers see as many tokens as there are."""
    model = family()
    batches = [ragged(seed, side=side) for seed in range(6)]
    expected = [gradients(model, batch) for batch in batches]
    apply_hyclora(model, HycloraConfig(**BASELINE))
    for batch, (loss, exact) in zip(batches, expected, strict=True):
        shapes.clear()
        our_loss, ours = gradients(model, batch)
        assert abs(our_loss - loss) < 1e-5 and largest_error(ours, exact) < 1e-5
        assert set(shapes) == {(1, int(batch["attention_mask"].sum()))}


@pytest.mark.parametrize("behind", [0, 4])
def test_padding_that_is_read(shapes, behind):
    """Stock takes the loss of a row's first token from the padding before it; behind: padding that nobody reads."""
    model, batch = llama(), ragged(0, side="left")
    if behind:
        batch["attention_mask"][:, -behind:] = 0
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss, exact = gradients(model, batch)
    logits = model(**batch).logits
    apply_hyclora(model, HycloraConfig(**BASELINE))
    our_loss, ours = gradients(model, batch)
    assert abs(our_loss - loss) < 1e-5 and largest_error(ours, exact) < 1e-5
    assert set(shapes) == {(4, 33)}
    torch.testing.assert_close(model(**batch).logits, logits, atol=1e-5, rtol=1e-5)


def test_hidden_states_of_packed_rows(shapes):
    """In the shape that they were given, though there are graphs."""
    model, batch = llama(), ragged(0, packed=True)
    expected = model(**batch, output_hidden_states=True).hidden_states
    graphed(model, BASELINE, recorder=Rerun())
    found = model(**batch, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    model(**batch).loss.backward()
    assert shapes[-1] == (1, filled_size(batch["input_ids"].numel())) != tuple(batch["input_ids"].shape)


VARIANTS = {
    "position ids": lambda b: b | {"position_ids": torch.arange(33, device=DEVICE)[None] + 3},
    "of each row": lambda b: b | {"position_ids": (b["attention_mask"].cumsum(1) - 1).clamp_min(0)},
    "a sum": lambda b: b | {"num_items_in_batch": torch.tensor(7.0, device=DEVICE)},
    "shifted": lambda b: b | {"shift_labels": b["labels"].roll(-1, 1)},
    "no labels": lambda b: b | {"labels": b["labels"].fill_(-100), "num_items_in_batch": 3},
    "a tuple": lambda b: b | {"return_dict": False},
    "a cache by default": lambda b: {k: t for k, t in b.items() if k != "use_cache"},
}


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS)
def test_ways_to_call(change, shapes):
    model, batch = llama(), change(ragged(0))

    def run():
        model.zero_grad()
        loss = model(**batch)[0]
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss, exact = run()
    apply_hyclora(model, HycloraConfig(**BASELINE))
    our_loss, ours = run()
    assert our_loss == pytest.approx(loss, abs=1e-5) and largest_error(ours, exact) < 1e-5
    labelled_behind = "shift_labels" in batch and not find_patch(model).step.padding_differs
    assert labelled_behind or shapes[0] == (1, int(batch["attention_mask"].sum()))


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_embeddings_with_a_gradient(checkpointing, shapes):
    model, batch = llama(), ragged(3)
    found = []
    for patched in (False, True):
        if patched:
            apply_hyclora(model, HycloraConfig(**BASELINE))
        if checkpointing is not None:
            model.gradient_checkpointing_enable(checkpointing)
        x = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        _, grads = gradients(model, {"inputs_embeds": x} | {k: t for k, t in batch.items() if k != "input_ids"})
        found.append(grads | {"x": x.grad})
    assert largest_error(found[1], found[0]) < 1e-5
    assert shapes[-1][0] == 1


WATCHED = {
    "a hook on a layer": lambda m: m.get_base_model().model.layers[0].register_forward_hook(lambda *_: None),
    "a hook on the last norm": lambda m: m.get_base_model().model.norm.register_forward_hook(lambda *_: None),
    "a hook on the decoder": lambda m: m.get_base_model().model.register_forward_hook(lambda *_: None),
    "a hook before the decoder": lambda m: m.get_base_model().model.register_forward_pre_hook(lambda *_: None),
    "a hook on embeddings": lambda m: m.get_input_embeddings().register_forward_hook(lambda *_: None),
    "a hook on angles": lambda m: m.get_base_model().model.rotary_emb.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("watch", WATCHED.values(), ids=WATCHED)
def test_who_looks_sees_the_batch(watch, shapes):
    model, batch = llama(), ragged(1)
    apply_hyclora(model, HycloraConfig(**BASELINE))
    handle = watch(model)
    loss, found = gradients(model, batch)
    assert set(shapes) == {(4, 33)}
    handle.remove()
    _, expected = gradients(model, batch)
    assert shapes[-1][0] == 1 and largest_error(found, expected) < 1e-5


def test_outputs_that_are_looked_at():
    """Logits of all positions, and hidden states where they are asked for, as in stock."""
    model, batch = llama(), ragged(2)

    def results():
        model.zero_grad()
        outputs = model(**batch)
        (outputs.loss + outputs.logits.float().log_softmax(-1).square().mean()).backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return grads | {"logits": outputs.logits, "hidden": model(**batch, output_hidden_states=True).hidden_states[1]}

    expected = results()
    apply_hyclora(model, HycloraConfig(**BASELINE))
    for _ in range(2):
        assert largest_error(results(), expected) < 1e-5


def test_a_caller_that_is_no_head_of_ours_gets_rows(shapes):
    """As TRL's: it says which positions it reads, and gets hidden states in the batch's shape."""
    model, batch = llama(), ragged(2)
    decoder, real = model.get_base_model().model, batch["attention_mask"].bool()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = decoder(**inputs).last_hidden_state[real]
    apply_hyclora(model, HycloraConfig(**BASELINE))
    step = find_patch(model).step
    step.unread = lambda padding: True
    hidden = decoder(**inputs).last_hidden_state
    assert shapes[0][0] == 1 and hidden.shape[:2] == real.shape and not hidden[~real].any()
    torch.testing.assert_close(hidden[real], expected, atol=1e-5, rtol=1e-5)
    step.unread = None
    decoder(**inputs)
    assert shapes[-1] == (4, 33)


def test_statistics_are_those_of_real_tokens():
    """Calibration sees no filler, and counts what it counts of the batch."""
    found = []
    for stream in (False, True):
        model = llama()
        graphs = graphed(model, {"stream": stream})
        for seed in range(CALIBRATION):
            model(**ragged(seed)).loss.backward()
        assert not graphs.recordings
        patch = find_patch(model)
        found.append([s.state_dict() for block in patch.blocks for s in block.savers.values() if s.state_dict()])
        assert patch.calibration.counted == sum(
            int(ragged(seed)["attention_mask"].sum()) for seed in range(CALIBRATION)
        )
    assert all(equal_up_to_rounding(a, b) for a, b in zip(*found, strict=True))


def equal_up_to_rounding(a: dict, b: dict) -> bool:
    return all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-5) for name in a)


def half(model):
    """In what a GPU's kernel for documents takes: without it rows cannot be recorded there."""
    return model.to(torch.bfloat16) if DEVICE == "cuda" else model


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_one_recording_serves_many_batches(kind):
    """Bit for bit what the layers give one by one, whatever the documents of a row that fits."""
    stock = half(llama())
    ours = copy.deepcopy(stock)
    apply_hyclora(stock, config(stream=True, cuda_graphs=False))
    graphs = graphed(ours, {"stream": True}, recorder=Rerun())
    steps = [ragged(seed, packed=kind == "packed") for seed in range(12)]
    tokens = [int((b["attention_mask"] if kind == "padded" else b["input_ids"] > -1).sum()) for b in steps]
    sizes = {filled_size(n) for n in tokens[CALIBRATION:]}
    # the filled row, that the other model has not, is part of the sums over tokens
    find_patch(stock).add_graphs(None)
    find_patch(stock).graphs._possible = lambda: False
    theirs, found = train(stock, steps), train(ours, steps)
    assert 1 <= len(graphs.recordings) <= len(sizes) < len(set(tokens))
    assert all(equal(a, b) for a, b in zip(found, theirs, strict=True))
    exact = [gradients(half(llama()), batch)[1] for batch in steps[-2:]]
    for grads, expected in zip(found[-2:], exact, strict=True):
        cosines = [torch.cosine_similarity(grads[n].flatten(), expected[n].flatten(), dim=0) for n in expected]
        assert torch.stack(cosines).mean() > 0.98


@pytest.mark.skipif(
    DEVICE == "cuda", reason="rows of fp32 are not recorded on a GPU, where codes follow bf16's rounding"
)
def test_what_a_row_is_filled_up_with_changes_nothing():
    """Kept in 4 bit, in fp32: gradients of a row that is as long as its tokens differ by rounding alone."""
    stock = llama()
    ours = copy.deepcopy(stock)
    apply_hyclora(stock, config(stream=True, cuda_graphs=False))
    graphs = graphed(ours, {"stream": True}, recorder=Rerun())
    steps = [ragged(seed) for seed in range(CALIBRATION + 3)]
    theirs, found = train(stock, steps), train(ours, steps)
    assert graphs.sizes.recorded
    assert all(largest_error(a, b) < 1e-5 for a, b in zip(found, theirs, strict=True))


def test_rows_of_many_lengths_share_a_recording(shapes):
    """One row a batch has no padding; a shape that most batches have stays as it is."""
    stock = half(llama())
    ours = copy.deepcopy(stock)
    apply_hyclora(stock, config())
    graphs = graphed(ours, {"stream": True}, recorder=Rerun())
    ids = [torch.randint(0, 128, (1, n), device=DEVICE) for n in (20, 21, 19, 30, 25, 33, 40, 33)]
    steps = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]
    train(ours, steps)
    assert len(graphs.recordings) == 1 and shapes[-1] == (1, 64)
    graphs.clear()
    train(ours, steps[:1] * 12)
    assert shapes[-1] == (1, 20)


def test_the_row_is_known_before_hugging_faces_code(monkeypatch):
    """Its replay starts when the tokens are there, whatever the size before was."""
    stock = half(llama())
    ours = copy.deepcopy(stock)
    graphs = graphed(ours, {"stream": True}, recorder=Rerun())
    train(ours, [ragged(seed, longest=20 if seed % 2 else 90) for seed in range(CALIBRATION + 60)])
    assert len(graphs.recordings) > 1
    events, lookup = [], nn.Embedding.forward
    monkeypatch.setattr(nn.Embedding, "forward", lambda *args: (events.append("embeddings"), lookup(*args))[1])
    for recording in graphs.recordings.values():
        recording.forward = partial(lambda forward: (events.append("start"), forward()), recording.forward)
    for seed in range(6):
        batch = ragged(seed + 100, longest=20 if seed % 2 else 90)
        events.clear()
        ours.get_base_model().model.rotary_emb.inv_freq.add_(0)  # as where DDP broadcasts buffers
        found = train(ours, [batch])[0]
        assert events == ["start", "embeddings"]
        with graphs.paused():
            torch.testing.assert_close(found, train(ours, [batch])[0], atol=1e-2 if DEVICE == "cuda" else 1e-5, rtol=0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_step_that_is_interrupted(error, monkeypatch):
    """Evaluation afterwards is stock's."""
    model, batch = llama(), ragged(0)
    model.eval()
    with torch.no_grad():
        expected = model(**padded_batch()).logits
    model.train()
    apply_hyclora(model, HycloraConfig(**BASELINE))

    def interrupt(*_, **__):
        raise error

    with monkeypatch.context() as patched, pytest.raises(error):
        patched.setattr(LayerBlock, "forward", interrupt)
        model(**batch)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**padded_batch()).logits, expected)


def test_logits_of_packed_rows_that_are_looked_at():
    """Are there without another forward, draw nothing, and change nothing of later steps."""
    model = half(llama())
    graphs = graphed(model, {"stream": True}, recorder=Rerun())
    steps = [ragged(seed, packed=True) for seed in range(CALIBRATION + 6)]
    train(model, steps[:-1])
    expected = copy.deepcopy(model)
    state, index = torch.get_rng_state(), find_patch(model).step.index
    output = model(**steps[-1])
    assert graphs.recordings and find_patch(model).step.index == index + 1
    with find_patch(expected).graphs.paused():
        logits = expected(**steps[-1]).logits
    torch.testing.assert_close(output.logits, logits, atol=2e-2 if DEVICE == "cuda" else 1e-5, rtol=1e-5)
    assert output.logits.shape[:2] == steps[-1]["input_ids"].shape and torch.equal(torch.get_rng_state(), state)
    head = next(block for block in find_patch(model).blocks if isinstance(block, HeadBlock))
    assert not head.logits_read


def test_embeddings_where_ids_are_by_position(shapes):
    model, batch = llama(), ragged(0)
    decoder = model.get_base_model().model
    apply_hyclora(model, HycloraConfig(**BASELINE))
    find_patch(model).step.unread = lambda padding: True
    hidden = decoder(
        None, inputs_embeds=decoder.embed_tokens(batch["input_ids"]), attention_mask=batch["attention_mask"]
    )
    assert shapes[0][0] == 1 and hidden.last_hidden_state.shape[:2] == (4, 33)


def test_nothing_is_filled_up_that_no_recording_serves(shapes):
    model, batch = llama(), ragged(0)
    graphed(model, {"stream": True}, recorder=Rerun())
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": nothing_around})
    train(model, [batch] * (CALIBRATION + 3))
    assert set(shapes) == {(1, int(batch["attention_mask"].sum()))}


def test_auto_is_off_with_the_sparse_map(shapes):
    """Which is kept of rows; with flash it is on."""
    for attention, seen in (("eager", (3, 21)), ("flash", (1, int(padded_batch()["attention_mask"].sum())))):
        shapes.clear()
        model = llama()
        apply_hyclora(model, HycloraConfig(attention=attention, stream="auto", cuda_graphs=False))
        gradients(model, padded_batch())
        assert set(shapes) == {seen}


def test_whole_rows_stay_rows(shapes):
    model, batch = llama(), padded_batch()
    apply_hyclora(model, HycloraConfig(**BASELINE))
    batch["attention_mask"].fill_(1)
    gradients(model, batch)
    assert set(shapes) == {tuple(batch["input_ids"].shape)}
