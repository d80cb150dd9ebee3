"""Ways to run an encoder that is served, side by side: `python -m benchmarks.serve_execution`.

As it was trained (eager), as `--compile` runs it (torch.compile), and as a graph that torch.export made. Random weights
at 224 px, with as many threads as a replica has CPUs; repeats are interleaved, medians are printed. `begin` is what
loading takes until the first embedding, `apart` how far embeddings are from eager ones.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from benchmarks.serve_load import write
from benchmarks.threshold_curves import interleaved
from serve.model import CheckpointEmbedder, Execution

SIZES = (1, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "vit_small_patch16_224"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{'model':24} {'run as':9} {'begin s':>8} {'batch':>6} {'ms an image':>12} {'ratio':>6} {'apart':>8}")
    for name in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            compare(name, write(Path(scratch) / name.partition("_")[0], name), options.repeats)


def compare(name: str, folder: Path, repeats: int) -> None:
    """A row a way and a batch."""
    images = list(torch.randint(0, 256, (max(SIZES), 3, 224, 224), dtype=torch.uint8))
    begun, embedders = {}, {}
    for way, make in {"eager": eager, "compiled": compiled, "exported": exported}.items():
        start = time.perf_counter()
        embedders[way] = make(folder)
        for size in SIZES:
            embedders[way].embed(images[:size])
        begun[way] = time.perf_counter() - start
    expected = embedders["eager"].embed(images)
    for size in SIZES:
        times = interleaved([partial(each.embed, images[:size]) for each in embedders.values()], repeats)
        for way, seconds in zip(embedders, times, strict=True):
            apart = np.abs(embedders[way].embed(images) - expected).max()
            print(
                f"{name:24} {way:9} {begun[way]:>8.1f} {size:>6} {1000 * seconds / size:>12.1f} "
                f"{seconds / times[0]:>6.2f} {apart:>8.1e}",
                flush=True,
            )


def eager(folder: Path) -> CheckpointEmbedder:
    """As it was trained."""
    return CheckpointEmbedder(folder, "eager", "1", Execution(batch=max(SIZES)))


def compiled(folder: Path) -> CheckpointEmbedder:
    """By torch.compile."""
    return CheckpointEmbedder(folder, "compiled", "1", Execution(batch=max(SIZES), compiled=True))


def exported(folder: Path) -> CheckpointEmbedder:
    """As torch.export's graph, for any batch."""
    made: Any = eager(folder)
    example = torch.zeros(2, 3, 224, 224).to(memory_format=torch.channels_last)
    dynamic = ({0: torch.export.Dim("batch", min=1, max=max(SIZES))},)
    made._encoder = torch.export.export(made._encoder, (example,), dynamic_shapes=dynamic).module()
    return cast(CheckpointEmbedder, made)


if __name__ == "__main__":
    main()
