"""ranx's metrics of given rankings, run in its own environment: this file imports nothing of the project.

``python experiments/external/ranx_check.py RELEVANT.npy``: (queries, gallery) bool, best first; prints JSON, by metric a value
for each query. ``make other-metrics`` makes the environment: ranx brings numba and a compiler with it.
"""

from __future__ import annotations

import json
import sys

import numpy as np

METRICS = {
    "recall_at_1": "hit_rate@1",
    "recall_at_5": "hit_rate@5",
    "recall_at_10": "hit_rate@10",
    "map": "map",
    "map_at_1000": "map@1000",
}


def by_ranx(relevant: np.ndarray) -> dict[str, list[float]]:
    """Each metric of each ranking."""
    from ranx import Qrels, Run, evaluate

    queries, gallery = relevant.shape  # ranx sorts queries by name: padded, they stay in order
    judged = Qrels({f"{q:09d}": {str(g): 1 for g in np.flatnonzero(relevant[q])} for q in range(queries)})
    ranked = Run({f"{q:09d}": {str(g): float(gallery - g) for g in range(gallery)} for q in range(queries)})
    found = evaluate(judged, ranked, list(METRICS.values()), return_mean=False)
    return {ours: np.asarray(found[theirs]).tolist() for ours, theirs in METRICS.items()}


if __name__ == "__main__":
    print(json.dumps(by_ranx(np.load(sys.argv[1], allow_pickle=False))))
