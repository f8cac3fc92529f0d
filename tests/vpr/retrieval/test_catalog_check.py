from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from tests.vpr.retrieval.test_label_scores import clusters
from vpr.common.errors import UserError
from vpr.retrieval.catalog_check import CheckResult, Finding, Thresholds, check_labels
from vpr.retrieval.embeddings import l2_normalize
from vpr.retrieval.label_scores import LabelledVectors

PRODUCTS, IMAGES = 40, 12


def of_kind(result: CheckResult, kind: str) -> list[Finding]:
    return [finding for finding in result.findings if finding.kind == kind]


def with_vectors(data: LabelledVectors, rows: NDArray[np.int64], vectors: NDArray[np.float32]) -> LabelledVectors:
    changed = data.vectors.copy()
    changed[rows] = l2_normalize(vectors)
    return LabelledVectors(changed, data.labels)


def test_separate_products_have_no_findings() -> None:
    assert check_labels(clusters(PRODUCTS, IMAGES, 0.6), Thresholds()).findings == []


@pytest.mark.parametrize("seed", range(3))
def test_wrong_labels_are_found_with_their_product(seed: int) -> None:
    data = clusters(PRODUCTS, IMAGES, 1.0, seed)
    rng = np.random.default_rng(seed)
    wrong = rng.permutation(len(data))[: len(data) // 20]
    labels = data.labels.copy()
    labels[wrong] = (labels[wrong] + rng.integers(1, PRODUCTS, len(wrong))) % PRODUCTS
    result = check_labels(LabelledVectors(data.vectors, labels), Thresholds())
    found = of_kind(result, "wrong-label")
    is_wrong = np.isin(np.arange(len(data)), wrong)
    excess = result.scores.other - result.scores.own
    assert average_precision_score(is_wrong, excess) > 0.95
    assert {finding.row for finding in found} >= set(wrong.tolist())  # recall 1
    confident = [finding for finding in found if finding.confident]
    assert np.mean([is_wrong[finding.row] for finding in confident]) > 0.85
    assert len(confident) >= 0.6 * len(wrong)
    right = [finding.product == data.labels[finding.row] for finding in found if is_wrong[finding.row]]
    assert np.mean(right) > 0.95
    assert all(labels[finding.other] == finding.product for finding in found)
    assert [finding.score for finding in found] == sorted((finding.score for finding in found), reverse=True)


def test_outliers_are_images_like_no_other() -> None:
    data = clusters(PRODUCTS, IMAGES, 0.6)
    rows = np.arange(0, len(data), 48)
    centre = -data.vectors.mean(axis=0)
    odd = with_vectors(
        data, rows, np.random.default_rng(1).standard_normal((len(rows), 32)).astype(np.float32) + centre
    )
    found = {finding.row for finding in of_kind(check_labels(odd, Thresholds(outlier=0.3)), "outlier")}
    assert found == set(rows.tolist())
    by_default = of_kind(check_labels(odd, Thresholds()), "outlier")
    assert {finding.row for finding in by_default} <= set(rows.tolist())
    assert all(finding.score < odd.chance for finding in by_default)


def test_duplicates_are_found_across_products_only() -> None:
    data = clusters(PRODUCTS, IMAGES, 0.6)
    copies = {0: 1, 100: 200, 300: 400}
    pairs = {frozenset(pair) for pair in copies.items()}
    assert all(data.labels[a] != data.labels[b] for a, b in copies.items())
    same_product = data.groups[5][:2]
    rows = np.array([*copies, same_product[0]])
    noise = np.random.default_rng(2).standard_normal((len(rows), 32)).astype(np.float32) * 0.01
    copied = with_vectors(data, rows, data.vectors[[*copies.values(), same_product[1]]] + noise)
    found = of_kind(check_labels(copied, Thresholds()), "duplicate")
    assert {frozenset((finding.row, finding.other)) for finding in found} == pairs
    assert {finding.row for finding in found} == set(copies)  # the copy fits its product less
    scored = np.isin(np.arange(len(data)), [*copies])
    found = of_kind(check_labels(copied, Thresholds(), scored=scored), "duplicate")
    assert {finding.row for finding in found} == set(copies.values())  # the training image is named first


def test_equal_files_are_duplicates_whatever_their_vectors() -> None:
    data = clusters(6, 4, 0.6)
    first, second = int(data.groups[0][0]), int(data.groups[1][0])
    contents = np.array([str(row) for row in range(len(data))])
    contents[second] = contents[first]
    found = of_kind(check_labels(data, Thresholds(), contents), "duplicate")
    assert [{finding.row, finding.other} for finding in found] == [{first, second}]


@pytest.mark.parametrize("seed", range(3))
def test_split_product_is_to_be_merged_into_its_larger_part(seed: int) -> None:
    data = clusters(PRODUCTS, IMAGES, 0.8, seed)
    labels = data.labels.copy()
    parts = {}
    for new, product in enumerate((3, 7, 20), start=PRODUCTS):
        labels[data.groups[product][:4]] = new
        parts[new] = product
    result = check_labels(LabelledVectors(data.vectors, labels), Thresholds())
    found = of_kind(result, "merge")
    assert {int(labels[finding.row]): finding.product for finding in found} == parts
    assert of_kind(result, "confusable") == []


def test_overlapping_products_are_confusable_and_not_merged() -> None:
    rng = np.random.default_rng(0)
    data = clusters(PRODUCTS, IMAGES, 0.6)
    first, second = data.groups[0], data.groups[1]
    direction = data.vectors[first].mean(axis=0)
    offset = rng.standard_normal(32)
    offset *= 0.55 / np.linalg.norm(offset)
    noise = rng.standard_normal((2 * IMAGES, 32)) * 0.6 / np.sqrt(32)
    centres = np.repeat([direction, direction + offset], IMAGES, axis=0)
    near = with_vectors(data, np.concatenate([first, second]), (centres + noise).astype(np.float32))
    result = check_labels(near, Thresholds(confusable=0.1))
    assert [sorted((int(data.labels[f.row]), f.product)) for f in of_kind(result, "confusable")] == [[0, 1]]
    assert of_kind(result, "merge") == []


def test_products_of_one_image_must_be_as_near_as_one_product() -> None:
    data = clusters(10, 6, 0.5)
    labels = data.labels.copy()
    members = data.groups[4]
    typical = int(members[(data.vectors[members] @ data.sums[4]).argmax()])
    labels[typical] = 10
    found = of_kind(check_labels(LabelledVectors(data.vectors, labels), Thresholds()), "merge")
    assert [(finding.row, finding.product) for finding in found] == [(typical, 4)]
    alone = LabelledVectors(data.vectors[[rows[0] for rows in data.groups]], np.arange(10))
    assert check_labels(alone, Thresholds()).findings == []


def test_one_product_is_rejected() -> None:
    data = clusters(1, 5, 0.5)
    with pytest.raises(UserError, match=r"^embeddings: there is only one product\. "):
        check_labels(data, Thresholds())
