"""Replays whose gradients somebody listens to: DDP on two ranks, hooks on parameters, in and out of that."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hyclora import apply_hyclora
from hyclora.models.graphs.gradients import GradientBuffers, Listener
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.offloading import equal
from tests.helpers.ranks import run_ranks
from tests.helpers.replaying import CALIBRATION, Rerun, batches, config, graphed, replayed, train
from tests.helpers.small_models import gradients, largest_error, llama
from tests.models.test_stream import ragged

N_STEPS = 12
VIEWS = {"gradient_as_bucket_view": True}


def batch_of(rank: int, step: int) -> dict:
    """As many tokens on both ranks, in narrow rows at times: not recorded then, or when the other rank replays."""
    batch = batches(2 * N_STEPS)[2 * step + rank]
    narrow = (rank, step) in {(1, 5), (0, 7), (1, 8), (1, 9), (1, 10)}
    return {name: t.view(4, 8) for name, t in batch.items()} if narrow else batch


def adds_up(step: int) -> bool:
    """Whether gradients stay on the rank until the next step's are added."""
    return step > CALIBRATION and step % 2 == 0


def train_parallel(rank: int, model, options: dict, set_to_none: bool, graphs=None) -> tuple[list, list[bool]]:
    """Gradients after each step, and whether it replayed."""
    parallel = DistributedDataParallel(model, **options)
    found, replays = [], []
    for step in range(N_STEPS):
        if not (step and adds_up(step - 1)):
            parallel.zero_grad(set_to_none=set_to_none)
        with parallel.no_sync() if adds_up(step) else nullcontext():
            loss = parallel(**batch_of(rank, step)).loss
            replays.append(graphs is not None and graphs._pending() is not None)
            loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return found, replays


def compare(rank: int, options: dict, set_to_none: bool) -> None:
    """What both ranks get with replays: as layer by layer bit for bit, and as one process on both batches."""
    for layer_type in ("baseline", "intra_inter_full_fuse"):
        reference, ours = llama(), llama()
        apply_hyclora(reference, config(layer_type=layer_type, stream=False))
        expected, _ = train_parallel(rank, reference, options, set_to_none)
        graphs = graphed(ours, {"layer_type": layer_type, "stream": False}, recorder=Rerun())
        record, reduce, inside = graphs._capture, dist.all_reduce, []

        def capture(*args, record=record, reduce=reduce, inside=inside):
            dist.all_reduce = lambda *_, **__: inside.append(True)
            try:
                return record(*args)
            finally:
                dist.all_reduce = reduce

        graphs._capture = capture
        found, replays = train_parallel(rank, ours, options, set_to_none, graphs)
        assert all(equal(a, b) for a, b in zip(found, expected, strict=True))
        # the first step after calibration, and for each rank those that are narrow for the first time
        layer_by_layer = {*range(CALIBRATION + 1), 7 if rank == 0 else 5}
        assert [step for step, replay in enumerate(replays) if not replay] == sorted(layer_by_layer)
        assert not inside
        if layer_type == "baseline":
            stock = llama()
            exact = [[gradients(stock, batch_of(r, step))[1] for r in (0, 1)] for step in range(N_STEPS)]
            for step in range(1, N_STEPS):
                if not adds_up(step):
                    parts = exact[step] + (exact[step - 1] if adds_up(step - 1) else [])
                    mean = {name: sum(part[name] for part in parts) / 2 for name in parts[0]}
                    assert largest_error(found[step], mean) < 1e-5


WAYS = [
    ({}, True),
    (VIEWS, False),
    (VIEWS, True),
    ({"find_unused_parameters": True}, False),
    ({"static_graph": True}, True),
]


@pytest.mark.parametrize("options, set_to_none", WAYS, ids=str)
def test_two_ranks(tmp_path, options, set_to_none):
    run_ranks(compare, tmp_path, options, set_to_none)


def two_adapters() -> torch.nn.Module:
    model = llama()
    model.add_adapter("other", model.peft_config["default"])
    return model


def activate(model, name: str) -> None:
    """Which adapter a forward has; both stay trained."""
    model.set_adapter(name)
    for n, p in model.named_parameters():
        p.requires_grad_("lora" in n)


def scale_gradients(model) -> list:
    return [p.register_hook(lambda g: g / 2) for p in model.parameters() if p.requires_grad]


def odd_ways(way: str, rank: int, ours: bool) -> list[dict]:
    """Gradients after each second backward, the first of which is within no_sync."""
    torch.manual_seed(0)
    model = two_adapters() if way == "used" else llama()
    options = {"layer_type": "baseline", "stream": False}
    graphs = graphed(model, options, recorder=Rerun()) if ours else apply_hyclora(model, config(**options))
    if way == "used":
        activate(model, "other")
    views = way.startswith("views")
    parallel = DistributedDataParallel(model, find_unused_parameters=way == "used", gradient_as_bucket_view=views)
    found, replays, hooks = [], 0, []
    for step in range(-1, 14):
        late, last = step >= 8, step % 2 == 1
        if way == "used":
            activate(model, "other" if last else "default")
        if way == "views, hooks" and step == 9:
            hooks = scale_gradients(model)
        if not last:
            model.zero_grad(set_to_none=not views or way == "views" and late)
        with nullcontext() if last and way != "triggered" else parallel.no_sync():
            loss = parallel(**batches(32)[2 * step + 2 + rank]).loss
        replays += ours and graphs._pending() is not None
        if way == "triggered" and last:
            parallel.require_backward_grad_sync = True
            parallel.reducer.prepare_for_backward([])
        if way == "hooks":
            hooks = scale_gradients(model)
        loss.backward()
        if way == "hooks":
            [hook.remove() for hook in hooks]
        if last:
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert replays > 8 or not ours
    return found


def compare_odd_ways(rank: int, way: str) -> None:
    expected, found = (odd_ways(way, rank, ours) for ours in (False, True))
    assert all(equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("way", ["used", "triggered", "hooks", "views", "views, hooks"])
def test_what_ddp_and_hooks_see_is_what_layers_give(tmp_path, way):
    """used: a parameter that is used within no_sync alone is reduced all the same. triggered: the backward reduces of a
    forward within no_sync, as accelerate's trigger_sync_in_backward has it. hooks: registered after the forward. views:
    DDP's own views of its buckets stay where they are, when gradients are freed or hooked that were recorded there."""
    run_ranks(compare_odd_ways, tmp_path, way)


def compare_streams(rank: int) -> None:
    """Of ragged rows, replayed or not, and of rows of a batch as they are."""
    found = []
    for stream in (False, True):
        model, grads, replays = llama(), [], 0
        graphs = graphed(model, {"layer_type": "baseline", "stream": stream}, recorder=Rerun())
        parallel = DistributedDataParallel(model)
        for step in range(10):
            parallel.zero_grad()
            loss = parallel(**ragged(2 * step + rank)).loss
            replays += graphs._pending() is not None
            loss.backward()
            grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        found.append(grads)
        assert replays or not stream
    assert all(largest_error(a, b) < 1e-5 for a, b in zip(*found, strict=True))


def test_streams_of_two_ranks(tmp_path):
    run_ranks(compare_streams, tmp_path)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_go_on_where_somebody_begins_to_listen(recorded, one_process, set_to_none, monkeypatch):
    """A recording made for .grad's memory, and gradients that are in it, serve every listener, one after the other."""
    model, graphs, _ = recorded
    steps = batches(9)
    expected = train(model, steps, zero_every=9, set_to_none=set_to_none)
    nobody, sums, parts = Listener
    listeners = iter([nobody, sums, parts, sums, sums, nobody, parts, nobody, sums])
    monkeypatch.setattr(Listener, "of", lambda parameters: next(listeners))
    found = train(model, steps, zero_every=9, set_to_none=set_to_none)
    assert next(listeners, None) is None and len(graphs.recordings) == 1
    assert all(equal(a, b) for a, b in zip(found, expected, strict=True))


def test_sums_are_put_back_where_they_were(recorded, monkeypatch):
    """DDP gets the graph's own memory, and whoever keeps a gradient after it has been freed keeps its values."""
    model, graphs, batch = recorded
    monkeypatch.setattr(Listener, "of", lambda parameters: Listener.SUMS)
    trained = [p for p in model.parameters() if p.requires_grad]
    (recording,) = graphs.recordings.values()
    model.zero_grad()
    for _ in range(2):
        assert replayed(model, graphs, batch)
        assert all(p.grad.data_ptr() == recording.gradients[p].data_ptr() for p in trained)
    kept, values = [p.grad for p in trained], [p.grad.clone() for p in trained]
    model.zero_grad()
    assert replayed(model, graphs, batch)
    assert all(map(torch.equal, kept, values))
    assert all(torch.equal(2 * p.grad, value) for p, value in zip(trained, values, strict=True))


@pytest.mark.parametrize("kind", [Listener.SUMS, Listener.PARTS])
def test_gradients_of_others_than_asked_for_are_left_alone(recorded, kind, monkeypatch):
    """backward(inputs=...), as torch.autograd.grad, is no backward of all."""
    model, graphs, batch = recorded
    monkeypatch.setattr(Listener, "of", lambda parameters: kind)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    assert replayed(model, graphs, batch)
    values = [p.grad.clone() for p in trained]
    loss = model(**batch).loss
    loss.backward(inputs=trained[3:5])
    for i, (p, value) in enumerate(zip(trained, values, strict=True)):
        assert torch.equal(p.grad, 2 * value if i in (3, 4) else value)


def test_who_listens(one_process):
    """In a process group DDP for its sums; another wrapper's hooks cannot be seen."""
    module = torch.nn.Linear(2, 2).to(DEVICE)
    module.register_forward_hook(lambda *_: seen.append(Listener.of([module.weight])))
    x = torch.ones(2, device=DEVICE)
    seen, parallel = [], DistributedDataParallel(module)
    parallel(x)
    with parallel.no_sync():
        parallel(x)
    module(x)
    module.weight.register_hook(lambda g: None)
    parallel(x)
    assert seen == [Listener.SUMS, Listener.SUMS, Listener.PARTS, Listener.PARTS]


def test_hooks_on_parameters(recorded):
    """They get each gradient once, which is theirs: what they keep or change is in nobody's memory."""
    model, graphs, batch = recorded
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    kept, after = {}, []
    (expected,) = train(model, [batch])
    loss = expected.pop("loss")
    handles = [p.register_hook(lambda g, n=n: kept.setdefault(n, []).append(g)) for n, p in trained.items()]
    handles += [p.register_post_accumulate_grad_hook(after.append) for p in trained.values()]
    model.zero_grad()
    for i in (1, 2):
        assert replayed(model, graphs, batch)
        assert equal({n: p.grad for n, p in trained.items()}, {n: i * g for n, g in expected.items()})
        assert len(after) == i * len(trained) == sum(map(len, kept.values()))
        assert all(torch.equal(g, expected[n]) for n, grads in kept.items() for g in grads)
    for handle in handles:
        handle.remove()
    (found,) = train(model, [batch])
    assert equal(found, expected | {"loss": loss})
    assert all(torch.equal(g, expected[n]) for n, grads in kept.items() for g in grads)


def test_a_hook_that_comes_after_the_forward_is_refused(recorded):
    """Where no gradients pass through autograd it would not be called."""
    model, graphs, batch = recorded
    loss = model(**batch).loss
    hook = next(p for p in model.parameters() if p.requires_grad).register_hook(lambda g: g)
    with pytest.raises(RuntimeError, match="hook .* between forward and backward"):
        loss.backward()
    hook.remove()


def test_gradients_that_a_failed_backward_left_behind(recorded, monkeypatch):
    """They are in the graphs' memory, of which the failed one could take no note."""
    model, graphs, batch = recorded
    (expected,) = train(model, [batch])
    listeners = iter([Listener.SUMS, Listener.PARTS])
    monkeypatch.setattr(Listener, "of", lambda parameters: next(listeners))

    def fail(*_):
        raise ValueError("failed")

    model.zero_grad()
    with monkeypatch.context() as patched:
        patched.setattr(GradientBuffers, "_note", fail)
        with pytest.raises(ValueError, match="failed"):
            model(**batch).loss.backward()
    (found,) = train(model, [batch], set_to_none=False)
    assert equal(found, expected)


def test_gradients_of_a_few_tensors(recorded, one_process):
    """Where they pass through autograd it gives those that are asked for, and leaves .grad alone."""
    model, graphs, batch = recorded
    (expected,) = train(model, [batch])
    expected.pop("loss")
    names = list(expected)[::5]
    loss = model(**batch).loss
    assert graphs._pending() is not None
    found = torch.autograd.grad(loss, [model.get_parameter(n) for n in names], retain_graph=True)
    assert equal(dict(zip(names, found, strict=True)), {n: expected[n] for n in names})
    assert equal({n: model.get_parameter(n).grad for n in expected}, expected)
    with pytest.raises(RuntimeError, match="a second backward through the layers"):
        loss.backward()
