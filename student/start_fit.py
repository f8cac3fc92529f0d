"""Closed-form fit of the new layers of a student that starts from a pretrained model.

A new head of random weights would destroy what the start knows before it learns to read it. Instead, ridge regression
predicts the teacher's embeddings of some training images from the start's features, so that training begins with the
best linear student.
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


def fit_start(module: StudentModule, images: ImageDataset) -> float:
    """Fit the head of a student in place, and the projection of a stem that is a network.

    The module moves to the device that trains it.

    Returns:
        Mean cosine of the predicted and the teacher's embeddings, on products that the fit did not see.
    """
    module.to(compute_device())
    vit, groups = module.student.vit, _product_groups(module, images)
    stem = vit.to_patch_embedding
    if isinstance(stem, NetworkStem):
        network: nn.Module = stem.network
        pooled, targets = _collect(module, images, lambda x: network.forward_features(x).mean((2, 3)))  # type: ignore[operator]
        _fit_projection(stem.project, ridge(pooled, targets, groups)[0], pooled)
    head, vit.mlp_head = vit.mlp_head, nn.Identity()
    features, targets = _collect(module, images, vit)
    vit.mlp_head = head
    weight, bias, cosine = ridge(features, targets, groups)
    with torch.no_grad():
        head.weight.copy_(weight.T)
        head.bias.copy_(bias)
    return cosine


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


def _fit_projection(project: nn.Conv2d, weight: Tensor, pooled: Tensor) -> None:
    """Set a projection to the directions of the features that predict the most of the targets.

    This is reduced-rank regression (Izenman, "Reduced-rank regression for the multivariate linear model", Journal of
    Multivariate Analysis 5, 1975). Channels beyond the targets' width keep their initial directions. All have a mean of
    0, and a standard deviation of 1 on average.
    """
    centred = pooled.double() - pooled.double().mean(0)
    fitted = centred @ weight
    directions = torch.linalg.eigh(fitted.T @ fitted).eigenvectors.flip(1)[:, : project.out_channels]
    reduced = weight @ directions
    initial = project.weight.detach().flatten(1).double().T[:, reduced.shape[1] :]
    columns = [part / (centred @ part).std(0).square().mean().sqrt() for part in (reduced, initial) if part.shape[1]]
    combined = torch.cat(columns, 1)
    with torch.no_grad():
        project.weight.copy_(combined.T[:, :, None, None])
        assert project.bias is not None
        project.bias.copy_(-(pooled.double().mean(0) @ combined))


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
