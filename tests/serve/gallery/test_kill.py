"""kill -9 of a process that writes: what it was told is on the disk is there, and nothing that it never wrote."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from serve.gallery import store
from serve.gallery.items import Item, Remove, Settings
from serve.gallery.store import Add, Store
from tests.serve.gallery.rows import units

ROWS = units(256)


def change(seed: int, step: int) -> Add | Remove:
    """The change of a step, from the seed alone."""
    rng = random.Random(f"{seed} {step}")
    names = [f"item {rng.randrange(300)}" for _ in range(rng.choice([1, 1, 5, 60]))]
    if rng.random() < 0.25:
        return Remove(names)
    return Add(
        "m@1", [Item(name, ROWS[rng.randrange(256)], f'{{"step":{step}}}', bytes([rng.randrange(5)])) for name in names]
    )


def apply(state: dict[str, tuple[str | None, bytes]], made: Add | Remove) -> None:
    if isinstance(made, Remove):
        for name in made.ids:
            state.pop(name, None)
    else:
        state.update({item.id: (item.metadata, item.row.tobytes()) for item in made.items})


def held(gallery: Store) -> dict[str, tuple[str | None, bytes]]:
    assert gallery._index is not None
    return {
        each.id: (each.metadata, gallery._index.rows[gallery._slots[each.id]].tobytes())
        for each in gallery.page("", 10_000)
    }


def write(folder: Path, seed: int) -> None:
    """In the process that is killed: says each step when the disk has it, and writes the log anew now and then."""
    store._GARBAGE = 200
    gallery = Store(folder)
    for step in range(10**9):
        gallery.commit([change(seed, step)], 10**6)
        os.write(1, f"{step}\n".encode())
        gallery.tidy()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_nothing_that_was_acknowledged_is_lost(tmp_path: Path, seed: int) -> None:
    folder = tmp_path / "shop"
    folder.mkdir()
    store.make(folder, Settings(created=1, keep_images=seed % 2 == 1))
    code = (
        "import sys; from pathlib import Path; from tests.serve.gallery.test_kill import write; "
        "write(Path(sys.argv[1]), int(sys.argv[2]))"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(folder), str(seed)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    writer.stdout.readline()
    time.sleep(0.2 + 0.35 * random.Random(seed).random())
    writer.kill()
    steps = 1 + len(writer.stdout.read().splitlines())
    writer.wait()

    expected: dict[str, tuple[str | None, bytes]] = {}
    for step in range(steps):
        apply(expected, change(seed, step))
    after = dict(expected)
    apply(after, change(seed, steps))  # perhaps on the disk, though nobody was told
    gallery = Store(folder)
    assert held(gallery) in (expected, after), f"after {steps} steps"
    found = gallery.search(ROWS[0], "m@1", 1)
    assert found[0].distance == pytest.approx(
        min(np.linalg.norm(np.frombuffer(row, np.float32) - ROWS[0]) for _, row in held(gallery).values()), abs=1e-6
    )
    gallery.commit([change(seed, steps)], 10**6)
    gallery.close()
    assert held(Store(folder)) == after
