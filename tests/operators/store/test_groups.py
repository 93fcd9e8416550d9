"""Units and groups of the store: what is copied together, what is on the device, and what a unit's end frees."""

import pytest
import torch

from hyclora import HycloraConfig
from hyclora.operators.savers import Exact, Keeper, Step
from hyclora.operators.store import Store
from hyclora.operators.store.buffers import as_buffers
from hyclora.operators.store.store import Home
from tests.helpers.offloading import SLAB, LazyCopies, offloaded
from tests.helpers.small_models import llama, padded_batch

LAYERED = {"group": 4, "window": 3, "ahead": 3}


class Counting(LazyCopies):
    """Counts how often the computation forks to a copy and joins it."""

    forks = joins = 0

    def copy(self, pairs):
        self.forks += 1
        return super().copy(pairs)

    def wait(self, token):
        self.joins += 1
        super().wait(token)


def test_a_layer_is_one_copy_each_way():
    """One fork and one join in forward and in backward; but for the last layer, which does not leave the device."""
    n_layers = 6
    # the copies that count are the CPU's
    model, batch = llama(num_hidden_layers=n_layers).cpu(), {name: t.cpu() for name, t in padded_batch().items()}
    store = offloaded(model, HycloraConfig(layer_type="baseline"), Counting(), **LAYERED)
    loss = model(**batch).loss
    assert (store.copies.forks, store.copies.joins) == (n_layers, n_layers - 1)
    loss.backward()
    assert (store.copies.forks, store.copies.joins) == (2 * n_layers - 1, 2 * (n_layers - 1))


def put(store: Store, value: int) -> Home:
    """A unit of 512 bytes."""
    return store.put([torch.full((512,), value, dtype=torch.uint8)])[0]


def test_a_layer_is_fetched_while_another_is_used():
    """A group is on its way three units before it is asked for; at most seven units of four a layer on the device."""
    store = Store(Counting(), **LAYERED, slab=SLAB)
    homes = [put(store, i) for i in range(20)]
    assert store.device_bytes == 4 * 512 and store.host_bytes == 20 * 512
    while homes:
        home, forks = homes.pop(), store.copies.forks
        (tensor,) = store.read(home.unit)
        assert (tensor == len(homes)).all()
        assert store.copies.forks - forks == (len(homes) % 4 == 2 and len(homes) > 4)
        assert store.device_bytes <= 7 * 512
        del home, tensor
    assert store.empty and store.host_bytes == store.device_bytes == 0


def test_units_of_a_group_live_and_die_by_themselves():
    store = Store(Counting(), **LAYERED, slab=SLAB)
    homes = [put(store, i) for i in range(4)]
    del homes[1:3]
    assert store.host_bytes == store.device_bytes == 2 * 512
    for _ in range(8):
        put(store, 9)
    assert store.copies.forks == 1, "a unit was sent that nobody has"
    homes.append(put(store, 4))
    put(store, 9), put(store, 9)
    homes.append(put(store, 5))
    assert store.copies.forks == 2
    assert store.device_bytes == 2 * 512 and store.host_bytes == 4 * 512, "the first group is on the host alone"
    for value in (5, 4, 3, 0):
        home = homes.pop()
        assert (store.read(home.unit)[0] == value).all()
        del home
        assert store.host_bytes == len(homes) * 512
    assert store.empty and store.device_bytes == 0


def test_a_group_that_is_not_full():
    """Units wait on the device; a backward ends their group, settle() sends it."""
    store = Store(Counting(), **LAYERED, slab=SLAB)
    homes = [put(store, i) for i in range(6)]
    assert (store.read(homes[5].unit)[0] == 5).all()
    homes.append(put(store, 6))
    assert homes[5].unit.group is not homes[6].unit.group
    assert store.copies.forks == 1 and store.host_bytes == 4 * 512
    store.settle()
    assert store.copies.forks == 2 and store.host_bytes == 5 * 512 and not store.copies.queue
    for value in reversed(range(7)):
        assert (store.read(homes[value].unit)[0] == value).all()


def test_a_kept_tensor_that_changes_is_an_error():
    """As autograd says it of any saved tensor: what would be read is not what was kept."""

    class Ctx:
        def save_for_backward(self, *tensors):
            self.saved_tensors = tensors

        def maybe_clear_saved_tensors(self):
            """Autograd's own; nothing is held here."""

    for group, read in ((1, True), (1, False), (2, True)):
        store, ctx, x = Store(LazyCopies(), group=group, window=1, slab=SLAB), Ctx(), torch.randn(40, 50)
        keeper = Keeper({"a": Exact()}, Step(1), store)
        keeper.keep("a", x)
        keeper.save(ctx)
        x.add_(1)
        with pytest.raises(RuntimeError, match="inplace"):
            Keeper.load(ctx) if read else store.put([torch.randn(3)])


def test_tensors_survive_whatever_their_layout():
    """Views of one storage go as one buffer if they fill it; slices and transposes come back as they were."""
    wide, mixed = torch.randn(7, 30), torch.arange(64, dtype=torch.uint8)
    filling = list(wide.split(10, dim=1))
    odd = [torch.randn(9, 8).t(), torch.randn(5, 40)[:, 3:9], torch.randn(3, 1).expand(3, 6), torch.tensor(2.5)]
    halves = [mixed[:50], mixed[50:].view(torch.bfloat16), torch.randn(6) > 0]
    tensors = [*filling, *odd, *halves]
    assert len(as_buffers(filling)[0]) == 1 and len(as_buffers(halves)[0]) == 2
    store = Store(LazyCopies(), group=1, window=0, slab=SLAB)
    homes = store.put(tensors)
    assert homes[0].unit.buffers is None
    for ours, theirs in zip(store.read(homes[0].unit), tensors, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs)


@pytest.mark.parametrize("n_longer", [1, 2])
def test_what_is_needed_longer_holds_no_memory_of_the_others(n_longer):
    """Fetched parts have memory of their own; away and back each has its bytes."""
    store = Store(LazyCopies(), group=1, window=0, slab=SLAB)
    tensors, longer = [torch.randn(300), torch.randn(70)], [torch.randn(200, 3) for _ in range(n_longer)]
    unit = store.put(tensors, 1, longer)[0].unit
    assert unit.buffers is None
    found = store.read(unit)
    assert all(torch.equal(ours, t) for ours, t in zip(found, [*tensors, *longer], strict=True))
    storages = [t.untyped_storage().data_ptr() for t in found]
    assert len(set(storages[:2])) == len(set(storages[2:])) == 1 and storages[0] != storages[2]
    assert store.put([], 1, longer)[0].index == 0 and store.put([], 1) == []
