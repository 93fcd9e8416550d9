"""Pinned host memory: extents over slabs, and how much the host has left."""

from hyclora.operators.store.host import Arena, available_bytes
from tests.helpers.offloading import LazyCopies


def test_the_arena_reuses_and_merges():
    arena = Arena(LazyCopies().pin, slab=1000)
    a, b, c = (arena.take(400) for _ in range(3))
    assert (a, b, c) == ((0, 400), (400, 800), (800, 1200)) and arena.pinned == 2000
    assert [len(piece) for piece in arena.pieces(c[0], 400)] == [200, 200]
    arena.give(b)
    assert arena.take(500)[0] == 1200 and arena.take(300) == (400, 700) and arena.take(100) == (700, 800)
    for extent in ((1200, 1700), (0, 400), (700, 800), (800, 1200), (400, 700)):
        arena.give(extent)
    assert arena.used == 0 and len(arena._gaps) == 1 and arena.take(2000) == (0, 2000) and arena.pinned == 2000


def test_available_bytes_is_the_smallest_limit(tmp_path):
    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert available_bytes(tmp_path) == float("inf")
    write("proc/meminfo", "MemTotal: 100 kB\nMemAvailable:      90 kB\n")
    assert available_bytes(tmp_path) == 90 * 1024
    write("sys/fs/cgroup/memory.max", "max\n")
    assert available_bytes(tmp_path) == 90 * 1024
    write("proc/self/cgroup", "0::/pod\n")
    write("sys/fs/cgroup/pod/memory.max", "50000\n")
    write("sys/fs/cgroup/pod/memory.current", "30000\n")
    write("sys/fs/cgroup/pod/memory.stat", "anon 1\ninactive_file 4000\n")
    assert available_bytes(tmp_path) == 24000


def test_a_host_with_little_available_memory_is_not_asked(monkeypatch):
    monkeypatch.setattr("hyclora.operators.store.host.available_bytes", lambda: 2**20)
    arena = Arena(LazyCopies().pin, 1000)
    assert arena.take(100) is None and arena.used == arena.pinned == 0
