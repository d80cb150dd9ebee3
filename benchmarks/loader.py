"""What reads photographs fastest, and how near the loader comes to it: `python -m benchmarks.loader`.

Makes JPEG files (500 x 375 pixels, about 70 KB) and prints

    decoders   milliseconds an image of each decoder that is installed, on one core, accurate settings: decoding, and
               with the resize to 224 x 224 (bilinear, anti-aliased) that goes fastest with it
    loader     images/s of dml.data.loader over all cores, augmented for training and for evaluation, beside the best
               of these: on one core, times the number of cores, and in as many processes at once, which says what the
               machine gives just then; the mean of ratios of interleaved rounds with its 95 % interval, and the ratio
               of CPU seconds an image, in which other work on the machine shows less
    large      the same file at 3000 x 2000: all of it, and no more of it than is needed (`decode(enough=...)`)

pip install opencv-python-headless pyvips[binary] torchcodec adds rows to the first table; none of them is needed.
"""

import argparse
import functools
import io
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from benchmarks.train_throughput import ratio_line
from dml import recipes
from dml.config import Config
from dml.data import datasets, images, loader, sampler

SIZE = 224
CLASSES, PER_CLASS, KINDS = 24, 20, 40
Decoder = Callable[[bytes], Tensor]
"""A JPEG -> uint8 (3, H, W)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        photographs = [photograph(number) for number in range(KINDS)]
        write(Path(root), photographs)
        print(f"{np.mean([len(data) for data in photographs]) / 1000:.0f} KB a photograph; {options.cores} cores")
        best = decoders(photographs, options.rounds)
        against(best, photographs, Path(root), options.cores, options.rounds)
    large(options.rounds)


def photograph(seed: int, width: int = 500, height: int = 375) -> bytes:
    """Blobs, texture and sensor noise, of the size in bytes that a camera's JPEG of these pixels has."""
    generator = np.random.default_rng(seed)
    pixels = generator.normal(0, 6, (height, width, 3))
    for cell, contrast in ((40, 1.0), (6, 0.25)):
        coarse = generator.integers(0, 256, (height // cell, width // cell, 3), dtype=np.uint8)
        blurred = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        pixels += contrast * np.asarray(blurred, dtype=np.float64) - (0 if contrast == 1.0 else 128 * contrast)
    stream = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def write(root: Path, photographs: Sequence[bytes]) -> None:
    for label in range(CLASSES):
        folder = root / f"{label:02d}"
        folder.mkdir()
        for number in range(PER_CLASS):
            (folder / f"{number}.jpg").write_bytes(photographs[(label * PER_CLASS + number) % len(photographs)])


def available() -> dict[str, Decoder]:
    """The decoders of the packages that are installed, single-threaded."""
    found: dict[str, Decoder] = {}
    for name, decode in DECODERS.items():
        try:
            decode(photograph(0, 64, 64))
        except (ImportError, OSError, RuntimeError) as error:
            print(f"{name}: not measured ({str(error).splitlines()[0]})")
            continue
        found[name] = decode
    return found


def _pillow(data: bytes) -> Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


def _torchvision(data: bytes) -> Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    pixels: Tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    return pixels


def _simplejpeg(data: bytes) -> Tensor:
    return torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)


def _opencv(data: bytes) -> Tensor:
    import cv2

    cv2.setNumThreads(1)
    return torch.from_numpy(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)).permute(2, 0, 1)


def _torchcodec(data: bytes) -> Tensor:
    from torchcodec.decoders import decode_jpeg

    pixels: Tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return pixels


def _vips(data: bytes) -> Tensor:
    import pyvips

    return torch.from_numpy(pyvips.Image.new_from_buffer(data, "").numpy()).permute(2, 0, 1)


DECODERS: dict[str, Decoder] = {
    "Pillow": _pillow,
    "torchvision": _torchvision,
    "simplejpeg": _simplejpeg,
    "OpenCV": _opencv,
    "torchcodec": _torchcodec,
    "libvips": _vips,
}


def resized(pixels: Tensor) -> Tensor:
    """uint8 (3, S, S), by the fastest way that torch has for this layout."""
    alone = pixels.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return functional.interpolate(alone, size=(SIZE, SIZE), mode="bilinear", antialias=True)[0]


def pillow_alone(data: bytes) -> Tensor:
    """Decoded and resized without leaving Pillow."""
    small = Image.open(io.BytesIO(data)).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


def decoders(photographs: Sequence[bytes], rounds: int) -> Decoder:
    """Prints the table; returns the fastest decoder of those measured."""
    found = available()
    calls: dict[str, Decoder] = dict(found)
    for name, decode in found.items():
        calls[f"{name} and resize"] = lambda data, decode=decode: resized(decode(data))  # type: ignore[misc]
    calls["Pillow and its own resize"] = pillow_alone
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seen[name].append(1 / rate(call, photographs[:20]))
    took = {name: statistics.median(times) * 1e3 for name, times in seen.items()}
    print(f"\n{'decoder, one core':<20} {'decode ms':>10} {'with resize ms':>15} {'images/s':>9}")
    for name in sorted(found, key=lambda name: took[f"{name} and resize"]):
        whole = took[f"{name} and resize"]
        print(f"{name:<20} {took[name]:>10.3f} {whole:>15.3f} {1e3 / whole:>9.0f}")
    whole = took["Pillow and its own resize"]
    print(f"{'Pillow alone':<20} {'':>10} {whole:>15.3f} {1e3 / whole:>9.0f}")
    return found[min(found, key=lambda name: took[f"{name} and resize"])]


def rate(call: Callable[[bytes], object], photographs: Sequence[bytes]) -> float:
    """Photographs a second."""
    began = time.perf_counter()
    for data in photographs:
        call(data)
    return len(photographs) / (time.perf_counter() - began)


def against(best: Decoder, photographs: Sequence[bytes], root: Path, cores: int, rounds: int) -> None:
    config = photo_config(root, cores)
    splits = datasets.load(config.data)
    plan = sampler.plan(splits.train.labels_N, config.batch, seed=0, epoch=0, steps=8)

    def training() -> int:
        return sum(len(batch.images) for batch in loader.batches(splits.train, config, plan, epoch=0))

    def evaluation() -> int:
        return sum(len(batch.images) for batch in loader.eval_batches(splits.val, config))

    seen: dict[str, list[float]] = {name: [] for name in ("one core", "all cores", "training", "evaluation")}
    cpu: dict[str, list[float]] = {name: [] for name in ("one core", "training", "evaluation")}
    with multiprocessing.get_context("fork").Pool(cores) as pool:
        for _ in range(rounds):
            took = time.process_time()
            seen["one core"].append(rate(lambda data: resized(best(data)), photographs * 4))
            cpu["one core"].append((time.process_time() - took) / (4 * len(photographs)))
            shares = [functools.partial(whole, best, photographs * 4)] * cores
            began = time.perf_counter()
            pool.map(_call, shares, chunksize=1)
            seen["all cores"].append(cores * 4 * len(photographs) / (time.perf_counter() - began))
            for name, read in (("training", training), ("evaluation", evaluation)):
                began, took = time.perf_counter(), time.process_time()
                count = read()
                seen[name].append(count / (time.perf_counter() - began))
                cpu[name].append((time.process_time() - took) / count)
    print(f"\n{'images/s, medians':<26}" + "".join(f"{name:>12}" for name in seen))
    print(f"{'':<26}" + "".join(f"{statistics.median(rates):>12.0f}" for rates in seen.values()))
    for name in ("training", "evaluation"):
        ideal = [cores * each for each in seen["one core"]]
        print(ratio_line(f"loader, {name}, beside {cores} x one core", seen[name], ideal))
        print(ratio_line(f"loader, {name}, beside {cores} processes", seen[name], seen["all cores"]))
        print(ratio_line(f"CPU an image, one core / {name}", cpu["one core"], cpu[name]))


def photo_config(root: Path, cores: int) -> Config:
    """The recipe for photographs, over these files."""
    changes = {"data.root": str(root), "data.threads": cores, "batch.classes": 12, "batch.samples": 5}
    return recipes.image_folder().replace(**changes, **{"evaluate.batch": 30})


def whole(best: Decoder, photographs: Sequence[bytes]) -> None:
    for data in photographs:
        resized(best(data))


def _call(work: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    work()


def large(rounds: int) -> None:
    data = photograph(0, 3000, 2000)
    config = recipes.image_folder().data
    enough = images.Transform(config).enough
    full: list[float] = []
    needed: list[float] = []
    for _ in range(rounds):
        full.append(1 / rate(lambda data: images.decode(data, 3), [data] * 2))
        needed.append(1 / rate(lambda data: images.decode(data, 3, enough=enough), [data] * 2))
    print(f"\n3000 x 2000, {len(data) / 1e6:.1f} MB: decoded {statistics.median(full) * 1e3:.1f} ms", end=", ")
    print(f"as small as evaluation needs it {statistics.median(needed) * 1e3:.1f} ms")
    ours = images.to_input([images.decode(data, 3, enough=enough)], config)
    exact = images.to_input([images.decode(data, 3)], config)
    print(f"mean difference of the input {float((ours - exact).abs().mean()) * config.std * 255:.2f} of 255 levels")


if __name__ == "__main__":
    main()
