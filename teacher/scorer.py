"""Scoring of weights on the validation split, with BatchNorm statistics recomputed for them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from teacher.model import load_teacher
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.data.config import LoaderConfig
from vpr.data.loaders import ImageDataset, validation_loader
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.embeddings import l2_normalize, score_split, torch_forward
from vpr.retrieval.metrics import RetrievalScores

Weights = dict[str, Tensor]
_MAX_KEPT_BYTES = 2 << 30  # pixels of a split that are kept in memory
_CALIBRATION_IMAGES = 2048  # images for BatchNorm statistics


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, norms: Sequence[_BatchNorm], batches: Iterable[Tensor]) -> None:
    """Set BatchNorm statistics to the mean over batches of each batch's mean and unbiased variance.

    Works like ``torch.optim.swa_utils.update_bn``, but keeps the rest of the model in evaluation mode, so that the
    features have no dropout, as at inference. The batches have equal size, so that each image has the same weight.
    """
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    for batch in batches:
        model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


class Scorer:
    """Evaluator of weights in one network; images are decoded once if they fit in memory, else by ``workers``.

    The split in ``validation`` is scored. ``seed`` selects training images for BatchNorm statistics.

    Raises:
        UserError: The validation split is missing, or BatchNorm has too few training images.
    """

    def __init__(self, model: str, catalog: Catalog, batch_size: int, workers: int, seed: int) -> None:
        network, artifact = load_teacher(model)
        assert artifact.card.preprocess is not None  # checked by load_teacher
        self.model = network.to("cuda" if torch.cuda.is_available() else "cpu")
        self.preprocess: Preprocess = artifact.card.preprocess
        self._forward = torch_forward(self.model)
        self.validation = catalog.select(split="validation")
        if not len(self.validation):
            raise UserError("catalog: a validation split is required. Build the catalogue with --validation 0.1.")
        self._loader_of_validation = self._loader(self.validation, batch_size, workers)
        self._norms = {n: m for n, m in self.model.named_modules() if isinstance(m, _BatchNorm)}
        if self._norms:
            sample = _sample_images(catalog.select(split="train"), batch_size, seed)
            self._calibration = self._loader(sample, batch_size, workers)

    def evaluate(self, weights: Weights, recalibrate_bn: Literal["none", "head", "all"]) -> RetrievalScores:
        """Load weights into the network, where they stay, and return their validation scores; float64 is rounded.

        ``recalibrate_bn`` names the BatchNorm layers whose statistics do not belong to the weights: ``none``, ``head``
        (those after the tower) or ``all``. They are recomputed on training images.
        """
        self.model.load_state_dict(weights)
        stale = [m for n, m in self._norms.items() if recalibrate_bn == "all" or not n.startswith("visual.")]
        if stale and recalibrate_bn != "none":
            device = next(self.model.parameters()).device
            calibration = (torch.from_numpy(batch).to(device) for batch in self._batches(self._calibration))
            recalibrate_batch_norm(self.model, stale, calibration)
        vectors = l2_normalize(
            np.concatenate([self._forward(batch) for batch in self._batches(self._loader_of_validation)])
        )
        return score_split(self.validation, vectors)

    def weights(self) -> Weights:
        """Return a copy of the network's weights, float32 on the CPU."""
        return {n: v.detach().cpu().clone().contiguous() for n, v in self.model.state_dict().items()}

    def _loader(self, catalog: Catalog, batch_size: int, workers: int) -> DataLoader[dict[str, Tensor]]:
        keep = len(catalog) * 3 * self.preprocess.size**2 <= _MAX_KEPT_BYTES
        return validation_loader(ImageDataset(catalog, self.preprocess, keep), LoaderConfig(batch_size, workers))

    def _batches(self, loader: DataLoader[dict[str, Tensor]]) -> Iterator[NDArray[np.float32]]:
        for batch in loader:
            yield self.preprocess.normalise(batch["pixels"].numpy())


def _sample_images(training: Catalog, batch_size: int, seed: int) -> Catalog:
    """Return a seeded random sample in full batches; consecutive rows would be images of few products."""
    if len(training) < 2:
        raise UserError("catalog: BatchNorm needs two or more training images. Use the catalogue of the training.")
    rows = np.random.default_rng(seed).permutation(len(training))[:_CALIBRATION_IMAGES]
    count = max(1, len(rows) // batch_size) * batch_size
    return training.take(rows[:count])
