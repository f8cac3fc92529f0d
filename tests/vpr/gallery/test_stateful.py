"""Random changes of a gallery against a plain dictionary."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.vpr.gallery.shop import Ids, Vectors, unit_vectors, write_shop
from tests.vpr.gallery.writer import WIDTHS, Contents, State, expect_migration, migrate, write_plans
from vpr.common.errors import UserError
from vpr.gallery.change import add_images, compact_gallery, create_gallery, remove_images, update_images
from vpr.gallery.config import AddConfig, CompactConfig, CreateConfig, RemoveConfig, UpdateConfig, VerifyGalleryConfig
from vpr.gallery.gallery import BACKFILL, IDS, load_gallery, vectors_of
from vpr.gallery.inspect import verify_gallery
from vpr.gallery.nearest import find_nearest
from vpr.gallery.store import LostFile, Snapshot

pytest.importorskip("lancedb")

# Texts that SQL, paths or keys joined from two texts could confuse.
_NAMES = ("a", "a'b", "1:a", "ü%_", 'x"y', "x\\y", ", --", "A")
_IDS = st.lists(st.tuples(st.sampled_from(_NAMES), st.sampled_from(_NAMES)), min_size=1, max_size=6, unique=True)


def read(snapshot: Snapshot) -> Contents:
    names = [name for name in (*IDS, BACKFILL, "vector") if name in snapshot.schema.names]
    table = snapshot.read(names)
    keys = list(zip(*(table[name].to_pylist() for name in IDS), strict=True))
    assert len(set(keys)) == len(keys)
    places = table[BACKFILL].to_pylist() if BACKFILL in names else [None] * len(table)
    vectors = [vector.tobytes() for vector in vectors_of(table)]
    return dict(zip(keys, zip(vectors, places, strict=True), strict=True))


class GalleryMachine(RuleBasedStateMachine):
    """A gallery, the dictionary that it must equal, and a reader with the version that it opened."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.seed = 0
        self.state = State("student", {})
        self.reader: tuple[Snapshot, Contents] | None = None

    def embed(self, ids: list[Ids]) -> tuple[str, dict[Ids, Vectors]]:
        self.seed += 1
        name = self.state.model
        vectors = unit_vectors(len(ids), WIDTHS[name], self.seed)
        return write_shop(self.folder / f"e{self.seed}", ids, vectors, name), dict(zip(ids, vectors, strict=True))

    def keep(self, vectors: dict[Ids, Vectors]) -> None:
        self.state.contents.update({key: (vector.tobytes(), None) for key, vector in vectors.items()})

    @initialize(ids=_IDS)
    def create(self, ids: list[Ids]) -> None:
        embeddings, vectors = self.embed(ids)
        self.gallery = str(create_gallery(CreateConfig(embeddings, str(self.folder / "gallery"))))
        write_plans(self.folder)
        self.keep(vectors)

    @rule(ids=_IDS)
    def add(self, ids: list[Ids]) -> None:
        embeddings, vectors = self.embed(ids)
        if self.state.contents.keys() & set(ids):
            with pytest.raises(UserError, match="is in the gallery"):
                add_images(AddConfig(self.gallery, embeddings))
            return
        add_images(AddConfig(self.gallery, embeddings))
        self.keep(vectors)

    @rule(ids=_IDS)
    def update(self, ids: list[Ids]) -> None:
        embeddings, vectors = self.embed(ids)
        update_images(UpdateConfig(self.gallery, embeddings))
        self.keep(vectors)

    @rule(products=st.sets(st.sampled_from(_NAMES), max_size=2), images=st.sets(st.sampled_from(_NAMES), max_size=2))
    def remove(self, products: set[str], images: set[str]) -> None:
        if products or images:
            config = RemoveConfig(self.gallery, tuple(products), tuple(images), skip_missing=True)
            remove_images(config)
            contents = self.state.contents
            kept = {key: contents[key] for key in contents if key[0] not in products and key[1] not in images}
            self.state = State(self.state.model, kept)

    @rule()
    def migrate(self) -> None:
        migrate(self.folder)
        self.state = expect_migration(self.state)

    @rule()
    def compact(self) -> None:
        compact_gallery(CompactConfig(self.gallery))

    @rule()
    def open(self) -> None:
        self.reader = (load_gallery(self.gallery).snapshot(), dict(self.state.contents))

    @precondition(lambda self: self.state.contents)
    @rule(k=st.integers(1, 5), seed=st.integers(0, 99))
    def search(self, k: int, seed: int) -> None:
        width = WIDTHS[self.state.model]
        query = unit_vectors(3, width, seed=1000 + seed)
        snapshot = load_gallery(self.gallery).snapshot()
        nearest = find_nearest(snapshot, query, k)
        vectors = np.array([np.frombuffer(vector, np.float32) for vector, _ in self.state.contents.values()])
        expected = -np.sort(-(query @ vectors.T), axis=1)[:, :k]
        np.testing.assert_allclose(nearest.scores[:, : expected.shape[1]], expected, atol=1e-6)
        found = vectors_of(snapshot.take(nearest.rows[nearest.found], ["vector"])).reshape(3, -1, width)
        np.testing.assert_allclose(np.einsum("qd,qkd->qk", query, found), expected, atol=1e-6)

    @invariant()
    def equals_the_dictionary(self) -> None:
        gallery = load_gallery(self.gallery)
        snapshot = gallery.snapshot()
        assert State(gallery.model_of(snapshot).model.name, read(snapshot)) == self.state

    @invariant()
    def reader_sees_its_version(self) -> None:
        if self.reader:
            try:
                assert read(self.reader[0]) == self.reader[1]
            except LostFile:  # compacted
                self.reader = None

    def teardown(self) -> None:
        verify_gallery(VerifyGalleryConfig(self.gallery))
        shutil.rmtree(self.folder)


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Any:
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


TestGallery = GalleryMachine.TestCase
TestGallery.settings = settings(max_examples=6, stateful_step_count=12, deadline=None)


@pytest.mark.slow
class TestGalleryLonger(GalleryMachine.TestCase):  # type: ignore[name-defined, misc]
    settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
