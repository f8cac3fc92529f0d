"""Scores weights on the validation split, with BatchNorm statistics that belong to them."""

from __future__ import annotations

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
_KEPT_BYTES = 2 << 30  # pixels of a split that are decoded once and kept
_NORM_IMAGES = 2048  # that BatchNorm statistics are estimated on


@torch.no_grad()
def estimate_norms(model: nn.Module, norms: Sequence[_BatchNorm], batches: Iterable[Tensor]) -> None:
    """Set BatchNorm statistics to the mean over batches of each batch's mean and unbiased variance.

    As ``torch.optim.swa_utils.update_bn``, but the rest of the model stays in evaluation mode: the
    statistics are those of features without dropout, as at inference.

    Args:
        model: in evaluation mode; left so.
        norms: the layers of it whose statistics are estimated.
        batches: of one size, so that each image weighs the same.
    """
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    for batch in batches:
        model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


class Scorer:
    """Puts weights into the network and scores them; images are decoded once where they fit in memory.

    Args:
        model: teacher artifact whose network is scored.
        catalog: ``validation`` is scored, ``train`` gives BatchNorm its statistics.
        batch_size: images at a time.
        workers: processes that decode, where the images do not fit in memory.
        seed: of the images that BatchNorm statistics are estimated on.

    Raises:
        UserError: no validation split, or too few training images for BatchNorm.
    """

    def __init__(self, model: str, catalog: Catalog, batch_size: int, workers: int, seed: int) -> None:
        network, artifact = load_teacher(model)
        assert artifact.card.preprocess is not None  # load_teacher has compared it
        self.model = network.to("cuda" if torch.cuda.is_available() else "cpu")
        self.preprocess: Preprocess = artifact.card.preprocess
        self._forward = torch_forward(self.model)
        self._catalog = catalog.select(split="validation")
        if not len(self._catalog):
            raise UserError("catalog: has no validation split to choose on: build it with --validation 0.1")
        self._validation = self._loader(self._catalog, batch_size, workers)
        self._norms = {n: m for n, m in self.model.named_modules() if isinstance(m, _BatchNorm)}
        if self._norms:
            drawn = _draw(catalog.select(split="train"), batch_size, seed)
            self._drawn = self._loader(drawn, batch_size, workers)

    def score(self, weights: Weights, norms: Literal["kept", "added", "all"]) -> RetrievalScores:
        """Validation scores of weights, which stay in the network.

        Args:
            weights: float32, or float64 and rounded here.
            norms: which BatchNorm statistics no longer belong to the weights and are estimated anew on training
                images: ``kept`` none, ``added`` those after the tower, ``all``.
        """
        self.model.load_state_dict(weights)
        stale = [m for n, m in self._norms.items() if norms == "all" or not n.startswith("visual.")]
        if stale and norms != "kept":
            device = next(self.model.parameters()).device
            estimate_norms(self.model, stale, (torch.from_numpy(b).to(device) for b in self._batches(self._drawn)))
        vectors = l2_normalize(np.concatenate([self._forward(batch) for batch in self._batches(self._validation)]))
        return score_split(self._catalog, vectors)

    def weights(self) -> Weights:
        """A copy of what is in the network, float32 on the CPU."""
        return {n: v.detach().cpu().clone().contiguous() for n, v in self.model.state_dict().items()}

    def _loader(self, catalog: Catalog, batch_size: int, workers: int) -> DataLoader[dict[str, Tensor]]:
        keep = len(catalog) * 3 * self.preprocess.size**2 <= _KEPT_BYTES
        return validation_loader(ImageDataset(catalog, self.preprocess, keep), LoaderConfig(batch_size, workers))

    def _batches(self, loader: DataLoader[dict[str, Tensor]]) -> Iterator[NDArray[np.float32]]:
        for batch in loader:
            yield self.preprocess.normalise(batch["pixels"].numpy())


def _draw(training: Catalog, batch_size: int, seed: int) -> Catalog:
    """Seeded training images in random order, as whole batches: statistics of one product would not be the set's."""
    if len(training) < 2:
        raise UserError("catalog: BatchNorm needs two training images or more: give the training catalogue")
    rows = np.random.default_rng(seed).permutation(len(training))[:_NORM_IMAGES]
    whole = max(1, len(rows) // batch_size) * batch_size
    return training.take(rows[:whole])
