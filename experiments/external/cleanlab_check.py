"""Label quality by cleanlab, in cleanlab's environment: this file imports nothing of the project.

``python experiments/external/cleanlab_check.py VECTORS.npy LABELS.npy`` reads (n, dim) float embeddings and (n,) labels
as integers, and prints JSON: for each image the label quality (lower is more suspicious), whether cleanlab calls the
label wrong, and the label that it predicts. As cleanlab recommends for embeddings, probabilities come from a logistic
regression in cross-validation. ``make other-metrics`` installs the environment.
"""

from __future__ import annotations

import json
import sys

import numpy as np


def check(vectors: np.ndarray, labels: np.ndarray) -> dict[str, list]:
    """Return ``quality``, ``is_wrong`` and ``predicted`` of each image."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
    probabilities = cross_val_predict(model, vectors, labels, cv=5, method="predict_proba")
    return {
        "quality": get_label_quality_scores(labels, probabilities).tolist(),
        "is_wrong": find_label_issues(labels, probabilities, n_jobs=1).tolist(),
        "predicted": probabilities.argmax(axis=1).tolist(),
    }


if __name__ == "__main__":
    print(json.dumps(check(*(np.load(path, allow_pickle=False) for path in sys.argv[1:3]))))
