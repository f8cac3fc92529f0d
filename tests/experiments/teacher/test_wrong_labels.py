from __future__ import annotations

import numpy as np

from experiments.teacher.wrong_labels import SHARE, find_injected, inject
from tests.vpr.retrieval.test_label_scores import clusters


def test_injected_labels_are_wrong_and_of_known_products() -> None:
    truth = np.repeat(np.arange(20), 10)
    labels, is_wrong = inject(truth, 1)
    assert is_wrong.sum() == round(SHARE * 200)
    np.testing.assert_array_equal(is_wrong, labels != truth)
    assert set(labels.tolist()) <= set(range(20))


def test_separate_clusters_give_perfect_scores() -> None:
    data = clusters(20, 10, 0.5)
    row = find_injected(data.vectors, data.labels, 0)
    assert row["average precision"] == 1
    assert row["precision of suggested moves"] == 1
    assert row["to the right product"] == 1
    assert row["recall of suggested moves"] > 0.5
