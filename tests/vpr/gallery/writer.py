"""Process that changes a gallery until it is killed; it announces each change before and after it."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from tests.vpr.gallery.shop import DIM, Ids, Vectors, name_images, unit_vectors, write_model, write_plan, write_shop
from vpr.gallery.change import add_images, compact_gallery, remove_images, update_images
from vpr.gallery.config import AddConfig, CompactConfig, RemoveConfig, UpdateConfig
from vpr.gallery.gallery import PENDING, load_gallery
from vpr.gallery.migrate import list_pending, replace_adapted, start_migration
from vpr.gallery.order import order_rows
from vpr.gallery.plan import load_plan

DELIVERIES = 6
WIDTHS = {"student": DIM, "other": DIM + 2}
_PRODUCTS = 4  # of a delivery
_IMAGES = 3
_PART = 5  # images that a migration embeds at once
PARTITIONS = 2  # of the index; the changes of `choose` always leave more images
_CHANCES = {"add": 0.1, "update": 0.25, "remove": 0.15, "compact": 0.1, "index": 0.1, "migrate": 0.3}
Contents = dict[Ids, tuple[bytes, int | None]]  # vector, place in the order of embedding


@dataclass(frozen=True)
class State:
    """The model of a gallery, and its images."""

    model: str
    contents: Contents


def write_deliveries(folder: Path) -> list[dict[str, Contents]]:
    """Write embeddings by two models to add or to replace, and plans between the models; return the contents."""
    deliveries = []
    for number in range(DELIVERIES):
        ids = name_images(_PRODUCTS * _IMAGES, _IMAGES, first=number * _PRODUCTS // 2)
        parts = {}
        for model, width in WIDTHS.items():
            vectors = unit_vectors(len(ids), width, seed=number)
            write_shop(folder / f"delivery-{number}-{model}", ids, vectors, model)
            parts[model] = {key: (vector.tobytes(), None) for key, vector in zip(ids, vectors, strict=True)}
        deliveries.append(parts)
    write_plans(folder)
    return deliveries


def write_plans(folder: Path) -> None:
    """Write a plan from each model to the other one."""
    models = {name: write_model(folder, name, width) for name, width in WIDTHS.items()}
    for name, other in (("student", "other"), ("other", "student")):
        # A map that copies values is exact, whatever the number of rows that are mapped at once.
        weight = np.eye(WIDTHS[name], WIDTHS[other], dtype=np.float32)
        write_plan(folder / f"plan-{name}", models[name], models[other], weight)


def choose(number: int) -> tuple[str, str]:
    """Return the change of this number: its kind, and the delivery or the product."""
    rng = np.random.default_rng(number)
    kind = str(rng.choice(list(_CHANCES), p=list(_CHANCES.values())))
    places = {"update": DELIVERIES, "remove": (DELIVERIES + 1) * _PRODUCTS // 2}
    return kind, str(rng.integers(places.get(kind, 1)))


def name_added(number: int) -> list[Ids]:
    """Return the ids of the images that the change of this number adds; no other change has them."""
    return [(f"added{number}", f"{number}/{image}.jpg") for image in range(_IMAGES)]


def see(model: str, ids: list[Ids]) -> Vectors:
    """Return what a model sees in the images."""
    seeds = [int.from_bytes(f"{product}{image}".encode()) for product, image in ids]
    return np.concatenate([unit_vectors(1, WIDTHS[model], seed) for seed in seeds])


def expect(state: State, number: int, deliveries: list[dict[str, Contents]]) -> State:
    """Return the state after a change, as a plain dictionary computes it."""
    kind, place = choose(number)
    contents = state.contents
    if kind == "update":
        return State(state.model, {**contents, **deliveries[int(place)][state.model]})
    if kind == "add":
        ids = name_added(number)
        added = {key: (vector.tobytes(), None) for key, vector in zip(ids, see(state.model, ids), strict=True)}
        return State(state.model, {**contents, **added})
    if kind == "remove":
        return State(state.model, {key: values for key, values in contents.items() if key[0] != f"p{place}"})
    return expect_migration(state) if kind == "migrate" else state


def expect_migration(state: State) -> State:
    """Return the state after :func:`migrate`."""
    pending = sorted((place, key) for key, (_, place) in state.contents.items() if place is not None)
    if part := [key for _, key in pending[:_PART]]:
        own = {key: (vector.tobytes(), None) for key, vector in zip(part, see(state.model, part), strict=True)}
        return State(state.model, {**state.contents, **own})
    other = next(name for name in WIDTHS if name != state.model)
    keys = list(state.contents)
    order = order_rows("random", [key[0] for key in keys], [key[1] for key in keys], np.empty(len(keys), np.float32))
    places = {keys[row]: place for place, row in enumerate(order, 1)}
    return State(other, {key: (_copy(vector, other), places[key]) for key, (vector, _) in state.contents.items()})


def _copy(vector: bytes, model: str) -> bytes:
    """Return the first values of a vector, or the values and zeros, at length 1."""
    values = np.zeros(WIDTHS[model], np.float32)
    old = np.frombuffer(vector, np.float32)[: len(values)]
    values[: len(old)] = old
    return (values / np.linalg.norm(values[None].astype(np.float64), axis=1)).astype(np.float32).tobytes()


def migrate(folder: Path) -> None:
    """Embed the next images of a migration, or start the one to the other model."""
    gallery = load_gallery(folder / "gallery")
    snapshot = gallery.snapshot()
    model = gallery.model_of(snapshot)
    if model.is_migrated and snapshot.count(PENDING):
        assert model.previous is not None
        plan = load_plan(str(folder / f"plan-{model.previous.name}"))
        part = list_pending(gallery, plan)[:_PART]
        keys = [(image.product, image.image) for image in part]
        replace_adapted(gallery, plan.target, part, see(model.model.name, keys))
    else:
        start_migration(gallery, load_plan(str(folder / f"plan-{model.model.name}")))


def change(folder: Path, number: int) -> None:
    """Make a change by the commands."""
    gallery = str(folder / "gallery")
    kind, place = choose(number)
    opened = load_gallery(gallery)
    model = opened.model_of(opened.snapshot()).model.name
    if kind == "add":
        ids, path = name_added(number), folder / f"added-{number}-{model}"
        if not path.exists():  # a killed process may have left it
            write_shop(path, ids, see(model, ids), model)
        add_images(AddConfig(gallery, str(path)))
    elif kind == "update":
        update_images(UpdateConfig(gallery, str(folder / f"delivery-{place}-{model}")))
    elif kind == "remove":
        remove_images(RemoveConfig(gallery, products=(f"p{place}",), skip_missing=True))
    elif kind in ("compact", "index"):
        compact_gallery(CompactConfig(gallery, index=PARTITIONS if kind == "index" else 0))
    else:
        migrate(folder)


if __name__ == "__main__":
    logging.disable()
    for number in count(int(sys.argv[2])):
        print(f"begin {number}", flush=True)
        change(Path(sys.argv[1]), number)
        print(f"end {number}", flush=True)
