"""Metrics of rankings by ranx, in ranx's environment: this file imports nothing of the project.

``python experiments/external/ranx_check.py RELEVANT.npy`` reads (queries, gallery) bool, best first, and prints JSON:
for each metric the values of the queries. ``make other-metrics`` installs the environment: ranx depends on numba.
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


def compute_metrics(relevant: np.ndarray) -> dict[str, list[float]]:
    """Return each metric of each ranking."""
    from ranx import Qrels, Run, evaluate

    queries, gallery = relevant.shape  # ranx sorts queries by name; padding keeps their order
    judged = Qrels({f"{q:09d}": {str(g): 1 for g in np.flatnonzero(relevant[q])} for q in range(queries)})
    ranked = Run({f"{q:09d}": {str(g): float(gallery - g) for g in range(gallery)} for q in range(queries)})
    values = evaluate(judged, ranked, list(METRICS.values()), return_mean=False)
    return {name: np.asarray(values[ranx_name]).tolist() for name, ranx_name in METRICS.items()}


if __name__ == "__main__":
    print(json.dumps(compute_metrics(np.load(sys.argv[1], allow_pickle=False))))
