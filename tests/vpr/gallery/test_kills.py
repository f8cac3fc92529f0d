"""``kill -9`` of a process that changes a gallery, and a full disk, while another process reads."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments.figures import ROOT
from tests.vpr.gallery.shop import DIM, name_images, unit_vectors, write_model, write_plan, write_shop
from tests.vpr.gallery.writer import PARTITIONS, Contents, State, expect, write_deliveries
from vpr.gallery.change import compact_gallery, create_gallery
from vpr.gallery.config import CompactConfig, CreateConfig, VerifyGalleryConfig
from vpr.gallery.gallery import BACKFILL, IDS, load_gallery, vectors_of
from vpr.gallery.inspect import verify_gallery
from vpr.gallery.nearest import find_nearest, usable_probes
from vpr.gallery.store import LostFile

pytest.importorskip("lancedb")


def read(gallery: Path) -> State:
    """Return the newest version, as a reader that starts again if its version was compacted meanwhile.

    In an indexed gallery, it also searches a vector with probes.
    """
    while True:
        opened = load_gallery(gallery)
        try:
            snapshot = opened.snapshot()
            names = [name for name in (*IDS, BACKFILL, "vector") if name in snapshot.schema.names]
            table = snapshot.read(names)
            if snapshot.partitions:
                probes = usable_probes(snapshot, PARTITIONS)
                nearest = find_nearest(snapshot, vectors_of(table.slice(0, 1)), 1, probes=probes)
                assert nearest.scores[0, 0] > 1 - 1e-5
        except LostFile:
            continue
        keys = zip(*(table[name].to_pylist() for name in IDS), strict=True)
        places = table[BACKFILL].to_pylist() if BACKFILL in names else [None] * len(table)
        vectors = [vector.tobytes() for vector in vectors_of(table)]
        contents = dict(zip(keys, zip(vectors, places, strict=True), strict=True))
        assert len(contents) == len(table)
        return State(opened.model_of(snapshot).model.name, contents)


def kill_once(
    folder: Path, first: int, state: State, deliveries: list[dict[str, Contents]], changes: int, delay: float
) -> tuple[int, State]:
    """Let a process change the gallery from change ``first`` on, read meanwhile, and kill it in the middle of a change.

    Args:
        folder: Folder of the gallery and the deliveries.
        first: Number of the first change.
        state: State before it.
        deliveries: Contents of the deliveries by each model.
        changes: Changes to complete before the kill.
        delay: Seconds from the begin of the next change to the kill.

    Returns:
        The number of the next change, and the state after the kill.
    """
    command = [sys.executable, "-m", "tests.vpr.gallery.writer", str(folder), str(first)]
    states, seen, lines = [state], [], []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        stream = process.stdout

        def collect() -> None:
            lines.extend(line.split() for line in stream if line.endswith("\n"))

        collector = threading.Thread(target=collect)
        collector.start()
        while len(lines) < 2 * changes + 1 and process.poll() is None:
            seen.append(read(folder / "gallery"))
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        collector.join()
    assert process.returncode == -signal.SIGKILL
    for number in (int(number) for kind, number in lines if kind == "begin"):
        states.append(expect(states[-1], number, deliveries))
    assert all(state in states for state in seen)  # a reader sees one version, never a part of one
    last_kind, last = lines[-1]
    after = read(folder / "gallery")
    assert after in (states[-2:] if last_kind == "begin" else states[-1:])
    return int(last) + (after == states[-1]), after


def kill_often(folder: Path, kills: int, seed: int) -> None:
    rng, deliveries = random.Random(seed), write_deliveries(folder)
    gallery = create_gallery(CreateConfig(str(folder / "delivery-0-student"), str(folder / "gallery")))
    number, state = 0, State("student", deliveries[0]["student"])
    for _ in range(kills):
        number, state = kill_once(folder, number, state, deliveries, rng.randint(0, 3), rng.uniform(0, 0.05))
        verify_gallery(VerifyGalleryConfig(str(gallery)))
    assert number > kills / 2  # changes were completed, not only begun
    compact_gallery(CompactConfig(str(gallery)))
    assert read(gallery) == state
    # Nothing of the killed writers stays: the table is one data file.
    assert len(list(gallery.rglob("*.lance"))) - 1 == 1
    assert sorted(path.name for path in gallery.iterdir()) == ["card.json", "vectors"]


def test_killed_writer_leaves_one_version(tmp_path: Path) -> None:
    kill_often(tmp_path, kills=3, seed=1)


@pytest.mark.reliability
def test_two_hundred_kills(tmp_path: Path) -> None:
    kill_often(tmp_path, kills=200, seed=2)


def test_full_disk_leaves_the_gallery(tmp_path: Path) -> None:
    ids = name_images(300)
    embeddings = write_shop(tmp_path / "e", ids[:30], unit_vectors(30))
    more = write_shop(tmp_path / "more", ids[30:], unit_vectors(270))
    gallery = create_gallery(CreateConfig(embeddings, str(tmp_path / "gallery")))
    before = read(gallery)
    models = write_model(tmp_path, "student"), write_model(tmp_path, "other", 5)
    plan = write_plan(tmp_path / "plan", *models, unit_vectors(DIM, 5))
    for words in (["add", "--embeddings", more], ["compact"], ["migrate", "--plan", plan]):
        code = (
            "import sys; from tests.reliability.faults.injection import limit_file_size; from vpr.cli import main;"
            "limit_file_size(1000); main(sys.argv[1:])"
        )
        command = [sys.executable, "-c", code, "gallery", *words, "--gallery", str(gallery)]
        process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert process.returncode == 2, process.stderr
        assert "the disk has no room (File too large)" in process.stderr.splitlines()[-1]
        assert "Traceback" not in process.stderr
        assert read(gallery) == before
        verify_gallery(VerifyGalleryConfig(str(gallery)))
