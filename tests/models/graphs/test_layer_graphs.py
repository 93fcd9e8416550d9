"""Layers replayed as graphs: CUDA graphs on a GPU, on a CPU a stand-in that repeats what was recorded."""

import copy
from types import MethodType

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.modeling_outputs import BaseModelOutputWithPast

from hyclora import apply_hyclora
from hyclora.models.graphs.recording import CudaRecorder
from hyclora.models.patch import find_patch
from hyclora.operators.linear import dropout, lora
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.offloading import equal
from tests.helpers.replaying import CALIBRATION, batches, config, graphed, record, replayed, starts, train
from tests.helpers.small_models import largest_error, llama, our_dropout, padded_batch, qwen3


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("layer_type", ["baseline", "intra_inter", "intra_inter_full_fuse"])
@pytest.mark.parametrize("family", [llama, qwen3])
def test_replayed_steps_are_the_same(family, layer_type, offload):
    """Losses and gradients bit for bit: new inputs, accumulation, weights that move, gradients freed or zero."""
    set_to_none = offload == (family is llama)
    stock = family()
    ours = copy.deepcopy(stock)
    apply_hyclora(stock, config(layer_type=layer_type))
    graphs = graphed(ours, {"layer_type": layer_type}, offload)
    steps = batches(CALIBRATION + 6)
    theirs = train(stock, steps, zero_every=3, set_to_none=set_to_none)
    found = train(ours, steps, zero_every=3, set_to_none=set_to_none)
    assert len(graphs.recordings) == 1
    assert all(equal(a, b) for a, b in zip(found, theirs, strict=True))


@pytest.mark.parametrize("padded", [False, True])
def test_embeddings_become_the_fixed_input(monkeypatch, padded):
    """Those that the decoder makes itself: a copy would be one more hidden state at the peak. A caller keeps hers."""
    model = llama()
    graphs, embedding = graphed(model, {}), model.get_input_embeddings()
    lookup, made = nn.Embedding.forward, []

    def forward(module, ids):
        made.append(lookup(module, ids))
        return made[-1]

    # on the class: an embedding with a forward of its own may keep what it gives
    monkeypatch.setattr(nn.Embedding, "forward", forward)
    steps = [padded_batch() for _ in batches(CALIBRATION + 2)] if padded else batches(CALIBRATION + 2)
    train(model, steps)
    (recording,) = graphs.recordings.values()
    assert recording.inputs[0].data_ptr() == made[-1].data_ptr()

    graphs.clear()
    given = [{"inputs_embeds": lookup(embedding, batch.pop("input_ids")).detach()} | batch for batch in steps[:2]]
    kept = [batch["inputs_embeds"].clone() for batch in given]
    train(model, given)
    assert len(graphs.recordings) == 1
    assert all(torch.equal(batch["inputs_embeds"], value) for batch, value in zip(given, kept, strict=True))


def test_in_hugging_faces_trainer(tmp_path):
    """Accumulation, clipping and zeroed gradients are the Trainer's; the weights end up the same, bit for bit."""
    stock = llama()
    ours = copy.deepcopy(stock)
    apply_hyclora(stock, config())
    graphs = graphed(ours, {})
    ids = torch.randint(0, 128, (24, 16), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": row, "attention_mask": [1] * 16, "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=6, max_grad_norm=0.1,
        learning_rate=1e-2, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=DEVICE == "cpu",
    )  # fmt: skip
    for model in (stock, ours):
        Trainer(model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator).train()
    assert len(graphs.recordings) == 1
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_replay_follows_the_weights():
    """An optimizer step between replays is seen, though nothing is recorded anew."""
    stock = llama()
    ours = copy.deepcopy(stock)
    apply_hyclora(stock, config())
    graphs = graphed(ours, {})
    for model in (stock, ours):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for batch in batches(CALIBRATION + 4):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.last = loss.item()
    assert len(graphs.recordings) == 1
    assert ours.last == stock.last


def test_kinds_of_input():
    """Each shape, and padding in front, is recorded the second time; GEMMs' memory is given back before and after."""
    model, reference, trimmed = llama(), llama(), []
    graphs = graphed(model, {"stream": False})
    graphs.recorder.trim = lambda: trimmed.append(len(graphs.recordings))
    apply_hyclora(reference, config(stream=False))
    for m in (model, reference):
        train(m, batches(CALIBRATION))
    wide, narrow = batches(1)[0], {name: t[:, :9] for name, t in batches(1)[0].items()}
    padded, front = padded_batch(), padded_batch()
    front["attention_mask"] = front["attention_mask"].flip(1)
    order = [(wide, 0), (narrow, 0), (wide, 1), (narrow, 2), (wide, 2), (padded, 2), (padded_batch(seed=1), 3)]
    for batch, recorded in [*order, (front, 3), (front, 4), (padded, 4), (narrow, 4), (front, 4)]:
        assert equal(train(model, [batch])[0], train(reference, [batch])[0])
        assert len(graphs.recordings) == recorded
    assert trimmed == [0, 1, 1, 2, 2, 3, 3, 4]


def test_layers_that_another_decoder_calls():
    """In its own order or not all of them: the first one says nothing of the others."""
    reference = llama()
    ours = copy.deepcopy(reference)
    graphs = graphed(ours, {"layer_type": "baseline"})
    *first, batch = batches(CALIBRATION + 3)
    train(ours, first)
    (recording,) = graphs.recordings.values()

    def forward(decoder, input_ids, attention_mask=None, **kwargs):
        hidden = decoder.embed_tokens(input_ids)
        angles = decoder.rotary_emb(hidden, torch.arange(input_ids.shape[1], device=DEVICE)[None])
        for layer in (decoder.layers[0], decoder.layers[0]):
            hidden = layer(hidden, position_embeddings=angles)
        return BaseModelOutputWithPast(decoder.norm(hidden))

    for model in (reference, ours):
        decoder = model.get_base_model().model
        decoder.forward = MethodType(forward, decoder)
    (expected,) = train(reference, [batch])
    assert all(largest_error(found, expected) < 1e-5 for found in train(ours, [batch] * 3))
    assert list(graphs.recordings.values()) == [recording]


def test_a_hook_runs(recorded):
    """A replay that was started before the hook was seen is in vain, and the next one is not started early."""
    model, graphs, batch = recorded
    started, (found,) = starts(graphs), train(model, [batch])
    found.pop("loss")
    mlp = model.get_submodule("base_model.model.model.layers.0.mlp")
    handle = mlp.register_forward_hook(lambda *_: None)
    for n in (2, 2):
        model.zero_grad()
        assert not replayed(model, graphs, batch)
        assert len(started) == n
        # the residual branch of a layer with a hook is added in another place
        assert largest_error({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, found) < 1e-5
    handle.remove()
    for n in (3, 4):
        assert replayed(model, graphs, batch)
        assert len(started) == n


def move(linear):
    linear.weight.data = linear.weight.data * 2


def replace(linear):
    linear.weight = nn.Parameter(linear.weight.detach() * 2, linear.weight.requires_grad)


@pytest.mark.parametrize("change, early", [(move, []), (replace, [True])])
@pytest.mark.parametrize("name", ["mlp.up_proj.base_layer", "mlp.up_proj.lora_A.default", "self_attn.q_norm"])
def test_weights_in_other_memory(name, change, early):
    """Nothing is started that would read freed memory, and a start with the former weights is in vain."""
    model, graphs, batch = record(qwen3)
    linear = model.get_submodule(f"base_model.model.model.layers.1.{name}")
    former, started = StorageWeakRef(linear.weight.untyped_storage()), []
    (recording,) = graphs.recordings.values()
    recording.forward = lambda: started.append(not former.expired())
    change(linear)
    found = train(model, [batch])[0]
    assert started == early
    with graphs.paused():
        expected = train(model, [batch])[0]
    assert equal(found, expected)
    assert equal(train(model, [batch] * 2)[1], expected) and len(graphs.recordings) == 2


def test_another_parameter_in_the_same_memory(recorded):
    """Gets the gradient, and not the one that a recording knows."""
    model, graphs, batch = recorded
    linear = graphs.projections[0].module.lora_A["default"]
    before, linear.weight = linear.weight, nn.Parameter(linear.weight.detach())
    before.grad = None
    found = train(model, [batch])[0]
    with graphs.paused():
        assert equal(found, train(model, [batch])[0])
    assert linear.weight.grad is not None and before.grad is None


@pytest.mark.parametrize("layers", [[1], [0], None], ids=str)
def test_layers_that_train_nothing(layers):
    """Below the lowest adapter there is no backward; with an adapter on the head alone there is no recording."""
    lora = {"layers_to_transform": layers} if layers else {"target_modules": ["lm_head"]}
    model, reference = llama(lora), llama(lora)
    graphs = graphed(model, {})
    apply_hyclora(reference, config())
    steps = batches(CALIBRATION + 4)
    assert all(equal(a, b) for a, b in zip(train(model, steps), train(reference, steps), strict=True))
    assert len(graphs.recordings) == (1 if layers else 0)


def test_a_hook_on_the_final_norm_keeps_what_it_gets(recorded):
    model, graphs, batch = recorded
    seen = []
    model.get_base_model().model.norm.register_forward_pre_hook(
        lambda module, args: seen.append((args[0], args[0].clone()))
    )
    train(model, [batch] * 2)
    assert all(torch.equal(kept, value) for kept, value in seen)


@pytest.fixture
def seeds(monkeypatch):
    """The seeds that were drawn, as tensors: a replay draws others into the same memory."""
    found, draw = [], lora.draw_seed
    monkeypatch.setattr(lora, "draw_seed", lambda device: found.append(draw(device)) or found[-1])
    return found


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("layer_type", ["baseline", "intra_inter_full_fuse"])
def test_replays_drop_what_layers_by_themselves_would(layer_type, offload):
    """Bit for bit, the step that records included; the generator is then where they would have left it."""
    stock = llama({"lora_dropout": 0.3})
    ours = copy.deepcopy(stock)
    apply_hyclora(stock, config(layer_type=layer_type))
    graphs = graphed(ours, {"layer_type": layer_type}, offload)
    steps = batches(1) * (CALIBRATION + 5)
    found = []
    for model in (stock, ours):
        torch.manual_seed(7)
        found.append((train(model, steps), torch.rand(4), torch.rand(4, device=DEVICE)))
    (theirs, *after), (mine, *drawn) = found
    assert len(graphs.recordings) == 1
    assert all(equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(drawn, after, strict=True))
    # a batch that comes again is dropped otherwise
    assert len({step["loss"].item() for step in mine}) == len(mine)


def test_gradients_of_a_replay_are_those_of_its_own_masks(seeds):
    """PEFT's own layers, given the seeds that are in the recording's memory after a replay, have its gradients."""
    model = llama({"lora_dropout": 0.3})
    stock = copy.deepcopy(model)
    graphs = graphed(model, {"layer_type": "baseline"})
    steps = batches(CALIBRATION + 5)
    train(model, steps[: CALIBRATION + 1])
    del seeds[:]
    train(model, steps[CALIBRATION + 1 : CALIBRATION + 2])
    recorded, before = list(seeds), [seed.clone() for seed in seeds]
    assert len(graphs.recordings) == 1 and len(seeds) == 8  # q+k+v, o, gate+up, down of two layers
    for batch in steps[CALIBRATION + 2 :]:
        found = train(model, [batch])[0]
        values = [seed.clone() for seed in recorded]
        assert len(seeds) == 8 and not any(map(torch.equal, values, before))
        given, before = iter(values), values
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dropout, "draw_seed", lambda device, given=given: next(given))
            with our_dropout(stock):
                expected = train(stock, [batch])[0]
        assert largest_error(found, expected) < 1e-5


def drop_by(model, p: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p


def test_dropout_that_is_switched():
    """Another probability is another recording, found again when it comes back; evaluation draws nothing."""
    stock = llama({"lora_dropout": 0.3})
    ours = copy.deepcopy(stock)
    apply_hyclora(stock, config())
    graphs, (batch,) = graphed(ours, {}), batches(1)
    found = []
    for model in (stock, ours):
        torch.manual_seed(7)
        losses = train(model, [batch] * CALIBRATION)
        for i, p in enumerate((0.3, 0.3, 0.0, 0.0, 0.3, 0.0, 0.1, 0.1, 0.3, 0.0)):
            drop_by(model, p)
            losses += train(model, [batch])
            if i % 2:
                model.eval()
                with torch.no_grad():
                    losses.append({"loss": model(**batch).loss})
                model.train()
        found.append(losses)
    assert all(equal(a, b) for a, b in zip(*found, strict=True))
    assert len(graphs.recordings) == 3
    assert replayed(ours, graphs, batch)


def test_two_forwards_before_their_backwards(recorded):
    """The second runs layer by layer, as the first one's activations are in the pool; both gradients count."""
    model, graphs, batch = recorded
    other = batches(1)[0]
    model.zero_grad()
    apart = [train(model, [b])[0] for b in (batch, other)]
    model.zero_grad()
    first, second = model(**batch).loss, model(**other).loss
    second.backward()
    first.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, apart[0][name] + apart[1][name])


def test_a_dropped_forward_frees_the_pool(recorded):
    model, graphs, batch = recorded
    model(**batch)
    assert replayed(model, graphs, batch)


def test_layers_with_arguments_of_their_own(recorded):
    """A decoder that gives its layers different arguments is never recorded."""
    model, graphs, batch = recorded
    graphs.clear()
    layer = graphs.layers[1].module
    bound = layer.forward
    layer.forward = lambda x, **kwargs: bound(x, **kwargs | {"position_ids": kwargs["position_ids"].clone()})
    train(model, [batch] * 3)
    assert not graphs.recordings


def test_a_copy_records_for_itself(recorded):
    model, graphs, batch = recorded
    twin = copy.deepcopy(model)
    twins = find_patch(twin).graphs
    assert graphs.recordings and not twins.recordings
    if DEVICE != "cuda":
        twins.recorder.graphs = twins
    found = train(twin, [batch] * 3)
    assert twins.recordings
    assert equal(found[-1], train(model, [batch])[0])


def test_a_stream_outlives_its_recordings(monkeypatch):
    """As its GEMM workspaces do; a pool does not, and a copied model has both for itself."""
    for name in ("Stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: object())
    recorder = CudaRecorder(torch.device("cuda", 0))
    cleared, copied = copy.copy(recorder), copy.deepcopy(recorder)
    assert cleared.stream is recorder.stream and cleared.pool is not recorder.pool
    assert copied.stream is not recorder.stream and copied.pool is not recorder.pool
    assert cleared.device == copied.device == recorder.device


def test_a_model_that_was_moved_runs_layer_by_layer():
    """A capture is of one device: of work on another one it would hold nothing."""
    model, graphs, batch = record()
    graphs.recorder.device = torch.device("meta")
    assert not replayed(model, graphs, batch)
