"""Time and memory of building a catalogue of many images, beside decoding the same images alone."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.figures import Figure, Row
from vpr.common.hardware import available_cpus
from vpr.data.intake import CHECK_SIZE
from vpr.imaging.decode import decode_bytes, read_image

_SIDE, _CELLS, _PER_PRODUCT = 320, 12, 10
_COMMAND = "catalog --reader folder --validation 0.1 --test 0.1"
# The peak of the process that builds, in kilobytes, on the last line of its output. Linux resets VmHWM for a new
# program; ru_maxrss would be at least that of the parent.
_CHILD = (
    "import sys; from vpr.cli import run; run(sys.argv[1:]); "
    "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
)


def write_product(folder: Path, product: int, side: int = _SIDE) -> None:
    """Write the images of one product: one coarse texture with different noise in each."""
    generator = np.random.default_rng(product)
    texture = generator.integers(0, 256, (_CELLS, _CELLS, 3))
    target = folder / f"p{product:06}"
    target.mkdir(parents=True)
    for number in range(_PER_PRODUCT):
        noise = generator.integers(-80, 81, texture.shape)
        cells = np.clip(texture + noise, 0, 255).astype(np.uint8)
        image = Image.fromarray(cells).resize((side, side), Image.Resampling.BICUBIC)
        image.save(target / f"{number}.jpg", quality=85)


def write_images(folder: Path, count: int, side: int = _SIDE) -> None:
    """Write ``count`` JPEGs of ``side`` pixels, a folder for each product."""
    products = range(count // _PER_PRODUCT)
    with ProcessPoolExecutor(len(available_cpus())) as pool:
        list(pool.map(partial(write_product, folder, side=side), products, chunksize=50))


def decoding_seconds(folder: Path) -> float:
    """Return the seconds of reading and decoding all images at the size at which a build checks them."""
    files = sorted(folder.rglob("*.jpg"))
    start = time.perf_counter()
    with ThreadPoolExecutor(len(available_cpus())) as pool:
        for _ in pool.map(lambda file: decode_bytes(read_image(file), file, None, CHECK_SIZE), files):
            pass
    return time.perf_counter() - start


def full_decoding_seconds(folder: Path) -> float:
    """Return the seconds of decoding all images at their full size by Pillow alone, without any check."""
    files = sorted(folder.rglob("*.jpg"))
    start = time.perf_counter()
    with ThreadPoolExecutor(len(available_cpus())) as pool:
        for _ in pool.map(lambda file: Image.open(file).convert("RGB"), files):
            pass
    return time.perf_counter() - start


def build(folder: Path, output: Path) -> tuple[float, float]:
    """Build the catalogue in a new process; return seconds, with the start of the process, and the peak in GB."""
    arguments = [*_COMMAND.split(), "--root", str(folder), "--output", str(output)]
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *arguments], check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    return time.perf_counter() - start, int(done.stdout.splitlines()[-1]) / 1e6


def build_cost(command: str, count: int = 200_000) -> tuple[list[Figure], list[Row]]:
    """Measure decoding alone, at full and at reduced size, and the build, on synthetic JPEGs in a temporary folder.

    The images are in the memory of the operating system for all of them, since they were just written.

    Args:
        command: Command that repeats the measurement.
        count: Number of images.
    """
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        write_images(images, count)
        before = decoding_seconds(images)
        seconds, memory = build(images, Path(folder) / "catalog")
        reduced, full = min(before, decoding_seconds(images)), full_decoding_seconds(images)
    name = f"catalogue of {count:,} images"
    figures = [
        Figure(f"{name}: build over decoding alone by Pillow", seconds / full, "times", 1.2, "<=", command),
        Figure(f"{name}: peak memory", memory, "GB", 2.0, "<=", command),
    ]
    parts = {
        "decoding alone by Pillow, at full size": full,
        "reading, checking and decoding, at the reduced size of a build": reduced,
        "`vpr catalog`, with its start": seconds,
    }
    rows = [
        {"what": what, "seconds": f"{value:.0f}", "images/s": f"{count / value:.0f}"} for what, value in parts.items()
    ]
    return figures, rows
