"""Images of scored products among unlabelled images: how many a teacher's embeddings find, at the measured threshold.

Held-out products play both parts. Of every second product, one half of the images is scored and the other half is
unlabelled, so that it should be left out. All images of the other products are unlabelled and should stay.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.figures import Figure, Row
from student.teacher_model import load_teacher_model
from student.unlabelled import MAX_WRONG, largest_cosines, measure_threshold
from vpr.artifacts.store import load_artifact
from vpr.common.distributed import compute_device
from vpr.data.catalog import load_catalog
from vpr.data.duplicates import NEAR_BITS, image_hash
from vpr.imaging.decode import decode
from vpr.retrieval.embeddings import embed, torch_forward

_BATCH, _HASH_SIDE = 64, 64


def found_figures(catalog: Path, teacher: Path, command: str) -> tuple[list[Figure], list[Row]]:
    """Return the share of images that are left out, of scored products and of others, by embedding and by hash."""
    held_out = load_catalog(catalog)
    held_out = held_out.where(held_out.table["split"].to_numpy() != "train")
    order = np.argsort(held_out.table["split"].to_numpy() != "validation", kind="stable")  # validation images first
    held_out = held_out.take(order)
    model = load_teacher_model(load_artifact(teacher, "teacher"))
    vectors = embed(held_out, model.preprocess, torch_forward(model.network.to(compute_device())), _BATCH)
    codes = np.unique(held_out.products, return_inverse=True)[1]
    turn = np.zeros(len(codes), dtype=np.int64)
    for code in np.unique(codes):
        turn[codes == code] = np.arange(np.count_nonzero(codes == code))
    is_scored = (codes % 2 == 0) & (turn % 2 == 0)
    is_validation = held_out.table["split"].to_numpy() == "validation"
    measured = measure_threshold(
        vectors[is_scored], held_out.products[is_scored], int(np.count_nonzero(is_scored & is_validation))
    )
    is_close = largest_cosines(vectors, vectors[is_scored]) >= measured.cosine
    hashes = [image_hash(decode(held_out.path(row), held_out.box(row), _HASH_SIDE)) for row in range(len(held_out))]
    values = np.array(hashes, dtype=np.uint64)
    distances = (np.bitwise_count(value ^ values[is_scored]).min() for value in values)
    is_near = np.fromiter(distances, dtype=np.int64, count=len(values)) <= NEAR_BITS
    rows: list[Row] = []
    figures: list[Figure] = []
    for name, left_out in (("embedding", is_close), ("hash, as before", is_near)):
        found = float(left_out[(codes % 2 == 0) & ~is_scored].mean())
        wrong = float(left_out[codes % 2 == 1].mean())
        threshold = f"cosine {measured.cosine:.3f}" if left_out is is_close else f"{NEAR_BITS} of 64 bits"
        rows.append(
            {"by": name, "threshold": threshold, "of scored products": f"{found:.1%}", "of others": f"{wrong:.1%}"}
        )
        if left_out is is_close:
            title = "unlabelled images of other products that are left out"
            figures = [Figure(title, round(wrong, 5), "", 2 * MAX_WRONG, "<=", command)]
            title = "unlabelled images of scored products that are left out"
            figures.append(Figure(title, round(found, 5), "", None, ">=", command))
    return figures, rows
