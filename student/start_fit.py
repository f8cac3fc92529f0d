"""Closed-form fit of the new layers of a student that starts from a pretrained model.

New layers of random weights would destroy what the start knows before they learn to read it. Instead, they begin
with the directions in which the start's features vary most (``features``), or with those that predict the teacher's
embeddings best (``teacher``).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from student.config import DistillConfig
from student.module import StudentModule
from student.network_stem import NetworkStem
from vpr.common.distributed import compute_device
from vpr.data.loaders import ImageDataset
from vpr.imaging.augment import apply_views, draw_views

_IMAGES, _VIEWS, _BATCH = 2048, 2, 64
# Penalties over the mean eigenvalue of the features' covariance. The best one is chosen on a fifth of the products.
_PENALTIES = tuple(10.0**power for power in range(-4, 3))
_FOLDS = 5


def fit_start(module: StudentModule, images: ImageDataset) -> float | None:
    """Fit the head of a student in place, and the projection of a stem that is a network.

    The module moves to the device that trains it.

    Returns:
        Mean cosine of the fitted student and the teacher on the images of the fit. None if their widths differ, so that
        only relations between images can be compared.
    """
    module.to(compute_device())
    vit, to_teacher = module.student.vit, module.config.fit_head == "teacher"
    stem = vit.to_patch_embedding
    if isinstance(stem, NetworkStem):
        network: nn.Module = stem.network
        pooled, targets = _collect(module, images, lambda x: network.forward_features(x).mean((2, 3)))  # type: ignore[operator]
        directions = _predictive(pooled, targets, _product_groups(module, images)) if to_teacher else _principal(pooled)
        _fit_projection(stem.project, directions, pooled)
    head, vit.mlp_head = vit.mlp_head, nn.Identity()
    features, targets = _collect(module, images, vit)
    vit.mlp_head = head
    if to_teacher and not isinstance(stem, NetworkStem):
        weight, bias = _predict(features, targets, _product_groups(module, images), head.out_features)
    else:  # The projection of a network predicts already. A second regression would fit these images more closely.
        weight, bias = rotate(features, targets, head.out_features)
    with torch.no_grad():
        head.weight.copy_(weight.T)
        head.bias.copy_(bias)
    if targets.shape[1] != head.out_features:
        return None
    return float(torch.cosine_similarity(features.double() @ weight + bias, targets.double()).mean())


def rotate(x: Tensor, y: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the map of (n, d) features to ``width`` that keeps their angles around the mean, turned towards targets.

    Features of more dimensions than ``width`` are reduced to their principal directions. Targets of that width decide
    rotation, scale and offset (orthogonal Procrustes; Schönemann, Psychometrika 31, 1966). Others decide nothing.

    Returns:
        (d, width) float64 weights and (width,) float64 bias.
    """
    x, y = x.double(), y.double()
    mean, rank = x.mean(0), min(width, x.shape[1])
    basis = _principal(x)[:, :rank] if rank < x.shape[1] else torch.eye(rank, dtype=x.dtype)
    if y.shape[1] != width:
        weight = basis @ torch.eye(rank, width, dtype=x.dtype)
        return weight, -mean @ weight
    reduced = (x - mean) @ basis
    u, values, v = torch.linalg.svd(reduced.T @ (y - y.mean(0)), full_matrices=False)
    scale = values.sum() / reduced.square().sum().clamp_min(torch.finfo(x.dtype).tiny)
    weight = scale * basis @ u @ v
    return weight, y.mean(0) - mean @ weight


def ridge(x: Tensor, y: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return the ridge regression of (n, k) targets on (n, d) features, both of any float type.

    The penalty is the one of the largest mean cosine on held-out groups.

    Args:
        x: Features.
        y: Targets.
        groups: (n,) int64; rows of one group are on the same side of the split.

    Returns:
        (d, k) float64 weights, (k,) float64 bias, and the mean cosine on the held-out groups.
    """
    x, y = x.double(), y.double()
    held_out = groups % _FOLDS == 0
    held_out = held_out if 0 < int(held_out.sum()) < len(x) else torch.arange(len(x)) % _FOLDS == 0
    cosines = {}
    for penalty in _PENALTIES:
        weight, bias = _solve(x[~held_out], y[~held_out], penalty)
        predicted = x[held_out] @ weight + bias
        cosines[penalty] = float(torch.cosine_similarity(predicted, y[held_out]).mean())
    best = max(cosines, key=lambda penalty: cosines[penalty])
    return *_solve(x, y, best), cosines[best]


def _solve(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    mean_x, mean_y = x.mean(0), y.mean(0)
    centred = x - mean_x
    covariance = centred.T @ centred
    covariance.diagonal().add_(penalty * covariance.diagonal().mean() + torch.finfo(x.dtype).tiny)
    weight = torch.linalg.solve(covariance, centred.T @ (y - mean_y))
    return weight, mean_y - mean_x @ weight


def _predict(x: Tensor, y: Tensor, groups: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return ridge regression of (n, k) targets on (n, d) features, reduced to its first directions unless k is width.

    Returns:
        (d, width) float64 weights and (width,) float64 bias.
    """
    if y.shape[1] == width:
        return ridge(x, y, groups)[:2]
    weight = torch.zeros(x.shape[1], width, dtype=torch.float64)
    directions = _predictive(x, y, groups)[:, :width]
    weight[:, : directions.shape[1]] = directions
    return weight, -x.double().mean(0) @ weight


def _principal(x: Tensor) -> Tensor:
    """Return the (d, d) float64 principal directions of (n, d) features as columns, the largest variance first."""
    centred = x.double() - x.double().mean(0)
    return torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)


def _predictive(x: Tensor, y: Tensor, groups: Tensor) -> Tensor:
    """Return the (d, k) float64 directions of (n, d) features that predict most of (n, k) targets, as columns.

    This is reduced-rank regression (Izenman, "Reduced-rank regression for the multivariate linear model", Journal of
    Multivariate Analysis 5, 1975).
    """
    weight, _, _ = ridge(x, y, groups)
    return weight @ _principal(x.double() @ weight)


def _fit_projection(project: nn.Conv2d, directions: Tensor, pooled: Tensor) -> None:
    """Set a projection to the first (d, k) directions of (n, d) pooled features.

    Channels beyond their number keep their initial directions. All have a mean of 0, and the two parts a mean variance
    of 1.
    """
    mean, count = pooled.double().mean(0), min(directions.shape[1], project.out_channels)
    initial = project.weight.detach().flatten(1).double().cpu().T[:, count:]
    parts = [part for part in (directions[:, :count], initial) if part.shape[1]]
    columns = [part / ((pooled.double() - mean) @ part).std(0).square().mean().sqrt() for part in parts]
    combined = torch.cat(columns, 1)
    with torch.no_grad():
        project.weight.copy_(combined.T[:, :, None, None])
        assert project.bias is not None
        project.bias.copy_(-(mean @ combined))


@torch.no_grad()
def _collect(
    module: StudentModule, images: ImageDataset, features: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return (n, d) features and (n, k) targets of the first views of evenly spaced training images."""
    module.eval()
    found = [(features(x).float().cpu(), target.float().cpu()) for x, target in _batches(module, images)]
    module.train()
    return torch.cat([x for x, _ in found]), torch.cat([target for _, target in found])


def _batches(module: StudentModule, images: ImageDataset) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield preprocessed views and the targets of the teacher, view after view."""
    config, device = module.config, compute_device()
    assert module.targets is not None
    for epoch in range(_views(config)):
        module.targets.start_epoch(epoch, device)
        view = module.targets.choose_view(epoch)
        for rows in _rows(images).split(_BATCH):
            batch = {name: value.to(device) for name, value in images.__getitems__(rows.tolist()).items()}
            parameters = draw_views(config.views, config.view_seed, rows, torch.full_like(rows, view))
            # Not `targets_for`: it gathers from all processes, whose group does not exist yet.
            targets = module.targets.embed_views(batch, parameters, epoch)
            yield module.normalise(apply_views(batch["pixels"], parameters, module.image_size)), targets


def _rows(images: ImageDataset) -> Tensor:
    count = min(_IMAGES, len(images))
    return torch.arange(count) * len(images) // count


def _views(config: DistillConfig) -> int:
    return min(_VIEWS, config.targets.views) if config.targets.mode == "cached" else _VIEWS


def _product_groups(module: StudentModule, images: ImageDataset) -> Tensor:
    """Return the product of each collected row; an image without a label counts as a product."""
    labels, rows = module.criterion.labels.by_row, _rows(images)
    groups = torch.where(labels[rows] >= 0, labels[rows], len(labels) + rows)
    return groups.repeat(_views(module.config))
