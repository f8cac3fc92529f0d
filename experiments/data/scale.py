"""Time and memory of building a catalogue of many images, beside decoding the same images alone.

``python -m experiments.data.scale FOLDER [COUNT]`` writes COUNT synthetic JPEGs (default 200,000, about 3 GB) into
FOLDER once, and measures both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from vpr.common.hardware import available_cpus
from vpr.data.intake import CHECK_SIZE
from vpr.imaging.decode import decode_bytes, read_image

_SIDE, _CELLS, _PER_PRODUCT = 320, 12, 10
_COMMAND = "catalog --reader folder --validation 0.1 --test 0.1"
# The peak of the process that builds, in kilobytes on Linux, on the last line of its output.
_CHILD = (
    "import resource, sys; from vpr.cli import run; run(sys.argv[1:]); "
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
)


def write_product(folder: Path, product: int) -> None:
    """Write the images of one product: one coarse texture with different noise in each."""
    generator = np.random.default_rng(product)
    texture = generator.integers(0, 256, (_CELLS, _CELLS, 3))
    target = folder / f"p{product:06}"
    target.mkdir(parents=True)
    for number in range(_PER_PRODUCT):
        noise = generator.integers(-80, 81, texture.shape)
        cells = np.clip(texture + noise, 0, 255).astype(np.uint8)
        image = Image.fromarray(cells).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
        image.save(target / f"{number}.jpg", quality=85)


def write_images(folder: Path, count: int) -> None:
    """Write ``count`` images unless a complete folder is there."""
    marker = folder.with_name(f"{folder.name}.complete")
    if marker.is_file() and int(marker.read_text(encoding="utf-8")) == count:
        return
    with ProcessPoolExecutor(len(available_cpus())) as pool:
        list(pool.map(write_product, [folder] * (count // _PER_PRODUCT), range(count // _PER_PRODUCT), chunksize=50))
    marker.write_text(str(count), encoding="utf-8")


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


def measure_scale(folder: Path, count: int) -> dict[str, float]:
    """Return seconds of decoding alone (the better of a run before and one after), of the build, and its memory."""
    images = folder / "images"
    write_images(images, count)
    before = decoding_seconds(images)
    seconds, memory = build(images, folder / "catalog")
    decoding, full = min(before, decoding_seconds(images)), full_decoding_seconds(images)
    return {
        "images": count,
        "decoding at reduced size, s": decoding,
        "decoding at full size by Pillow alone, s": full,
        "build, s": seconds,
        "peak memory, GB": memory,
    }


if __name__ == "__main__":
    print(json.dumps(measure_scale(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 200_000), indent=2))
