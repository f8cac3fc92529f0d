"""``vpr gallery plan-migration``: an adapter from a gallery's model to a new one, and recall on the way to it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from vpr.artifacts.card import Parent
from vpr.artifacts.stage import Stage
from vpr.artifacts.store import Artifact, load_artifact, reraise_as_artifact_error
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.seen import count_seen, hash_products, read_seen
from vpr.gallery.config import PlanConfig
from vpr.gallery.gallery import load_gallery
from vpr.gallery.order import ORDERS, OrderName
from vpr.gallery.plan_measure import Curve, Fit, SplitVectors, choose_order, fit_adapter, measure, read_split
from vpr.gallery.vector_model import VectorModel
from vpr.retrieval.adapter import METHODS, Adapter
from vpr.retrieval.embeddings import Embeddings, load_embeddings
from vpr.retrieval.intervals import TOO_FEW, Interval

log = get_logger(__name__)

FILE, ADAPTERS = "plan.json", "adapter.safetensors"
_SPLITS = ("train", "validation", "test")
_HEADER = 1 << 16  # bytes of a safetensors file besides the numbers


@dataclass(frozen=True)
class Plan:
    """A plan to migrate galleries.

    Attributes:
        artifact: Plan artifact.
        old: Model that the plan migrates from.
        target: Model that the plan migrates to, as a gallery records it.
        adapter: Map from the old model's vectors to the new one's.
        confidence: Linear map; the lengths of its results order the images.
        order: Order in which images are embedded again.
        seed: Seed of that order.
    """

    artifact: Artifact
    old: Parent
    target: VectorModel
    adapter: Adapter
    confidence: Adapter
    order: OrderName
    seed: int


def plan_migration(config: PlanConfig) -> Path:
    """Write a plan: the adapter, the order, and recall with 0, 10, ..., 100 % of the images embedded again.

    Training products fit the adapter, validation products choose its form and the order, test products are scored.

    Raises:
        UserError: The embeddings are not of the gallery's and of another model, differ in their images, or lack a
            split.
    """
    gallery = load_gallery(config.gallery)
    snapshot = gallery.snapshot()
    old, new = load_embeddings(config.old), load_embeddings(config.new)
    gallery.check_model(old, "old", snapshot)
    if new.model.sha256 == old.model.sha256:
        raise UserError(f"new: {config.new} is of the gallery's model '{new.model.name}'. Embed with the new model.")
    parents = [new.model, old.model.model_copy(update={"role": "old_model"})]
    parents += [old.artifact.as_parent("old"), new.artifact.as_parent("new")]
    stage = Stage(config.output, "migration", {"seed": config.seed}, parents, FILE)
    if artifact := stage.find():
        _log(json.loads(artifact.file(FILE).read_text(encoding="utf-8")), len(snapshot))
        return stage.path
    train, validation, test = (read_split(old, new, split) for split in _SPLITS)
    _check_disjoint(train, validation, test)
    fit = fit_adapter(train, validation)
    order, orders = choose_order(validation, fit, config.seed)
    result = _describe(old, new, fit, order, orders, (train, validation, test))
    result |= {"curve": [asdict(step) for step in measure(test, fit, order, config.seed)]}
    with stage.write() as draft:
        save_file(
            {
                "procrustes.weight": fit.procrustes.weight,
                "linear.weight": fit.linear.weight,
                "linear.bias": fit.linear.bias,
            },
            draft.path / ADAPTERS,
        )
        (draft.path / FILE).write_text(json.dumps(result, indent=1), encoding="utf-8")
        draft.embedding, draft.preprocess = new.artifact.card.embedding, new.artifact.card.preprocess
        draft.metrics = {key: result[key] for key in ("adapter", "order", "old_recall", "new_recall", "seen")}
        draft.metrics["start"] = result["curve"][0]
    log.info(f"{config.output}: {len(train.old)} training images of {train.count_products()} products fit the adapter")
    _log(result, len(snapshot))
    return stage.path


def load_plan(path: str) -> Plan:
    """Load a plan; raise :class:`UserError` if its files contradict its card."""
    artifact = load_artifact(path, "migration")
    card = artifact.card
    with reraise_as_artifact_error(artifact):
        values = json.loads(artifact.file(FILE).read_text(encoding="utf-8"))
        method, order, old_dim = values["adapter"], values["order"], int(values["old_dim"])
        models, olds = artifact.parents("model"), artifact.parents("old_model")
        if method not in METHODS or order not in ORDERS or len(models) != 1 or len(olds) != 1 or not card.embedding:
            raise ValueError("unknown adapter or order, or no model")
        new_dim = card.embedding.dim
        file = artifact.file(ADAPTERS)
        if file.stat().st_size > 4 * (2 * old_dim + 1) * new_dim + _HEADER:
            raise ValueError(f"{ADAPTERS} is larger than its adapters")
        tensors = load_file(file)
        procrustes = Adapter(tensors["procrustes.weight"], np.zeros(new_dim, np.float32))
        linear = Adapter(tensors["linear.weight"], tensors["linear.bias"])
        for adapter in (procrustes, linear):
            _check_adapter(adapter, old_dim, new_dim)
        seed = int(card.config["seed"])
        if seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {seed}")
    adapter = procrustes if method == "procrustes" else linear
    target = VectorModel(
        model=models[0], dim=new_dim, preprocess=card.preprocess, previous=olds[0], plan=artifact.sha256
    )
    return Plan(artifact, olds[0], target, adapter, linear, order, seed)


def _check_adapter(adapter: Adapter, old_dim: int, new_dim: int) -> None:
    for values, shape in ((adapter.weight, (old_dim, new_dim)), (adapter.bias, (new_dim,))):
        if values.shape != shape or values.dtype != np.float32 or not np.isfinite(values).all():
            raise ValueError(f"an adapter is not finite float32 of {old_dim} by {new_dim}")


def _check_disjoint(train: SplitVectors, validation: SplitVectors, test: SplitVectors) -> None:
    """Raise :class:`UserError` if a scored product also fits or chooses."""
    names = [set(part.products.tolist()) | set(part.query_products.tolist()) for part in (train, validation, test)]
    for shared in (names[0] & names[1], names[0] & names[2], names[1] & names[2]):
        if shared:
            problem = f"{len(shared)} products are in two splits, first '{min(shared)}'"
            raise UserError(f"old: {problem}. Split the catalogue by product, and embed it again.")


def _describe(
    old: Embeddings,
    new: Embeddings,
    fit: Fit,
    order: OrderName,
    orders: dict[str, dict[str, Any]],
    parts: tuple[SplitVectors, SplitVectors, SplitVectors],
) -> dict[str, Any]:
    """Return all of the plan but its curve, as JSON."""
    train, _, test = parts
    scored = hash_products(test.query_products.tolist())
    seen = {one.model.name: count_seen(read_seen(one.artifact), scored) for one in (old, new)}
    for name, counts in seen.items():
        if counts.learned:
            log.warning(f"{name}: {counts.learned}. Its recall is too high.")
    references = {"old_recall": test.score_old(), "new_recall": test.score(test.new)}
    return {
        "old_model": old.model.name,
        "new_model": new.model.name,
        "old_dim": train.old.shape[1],
        "new_dim": train.new.shape[1],
        "adapter": fit.method,
        "adapters": fit.candidates,
        "order": order,
        "orders": orders,
        "train_images": len(train.old),
        "train_products": train.count_products(),
        "test_queries": len(test.query_products),
        "test_products": len(np.unique(test.query_products)),
        "test_gallery": len(test.products),
        **{key: {"recall": scores.recall_at_1, "interval": scores.ci95} for key, scores in references.items()},
        "seen": {name: asdict(counts) for name, counts in seen.items()},
    }


def _log(result: dict[str, Any], images: int) -> None:
    """Log the table of a plan; ``images`` is the number of images of the gallery."""
    log.info(f"  {result['old_model']} ({result['old_dim']}) -> {result['new_model']} ({result['new_dim']})")
    log.info(f"  {'adapter':<10} {'ridge':>7}  validation recall@1  mAP    cosine")
    for row in result["adapters"]:
        mark = "  (used)" if row["is_chosen"] else ""
        ridge = "" if row["ridge"] is None else f"{row['ridge']:g}"
        log.info(
            f"  {row['method']:<10} {ridge:>7}  {row['recall']:>19.3f}  {row['map']:.3f}  {row['cosine']:.3f}{mark}"
        )
    for name, row in result["orders"].items():
        mark = "  (used)" if name == result["order"] else ""
        gain = f", over random [{row['gain'][0]:+.4f}, {row['gain'][1]:+.4f}]" if row["gain"] else ""
        log.info(f"  order {name:<8} validation recall@1 on the way {row['recall']:.3f}{gain}{mark}")
    log.info(f"  recall@1 of {result['test_queries']} queries of {result['test_products']} test products")
    log.info(f"  {'embedded':>8}  {'images':>9}  recall@1              of the new model's own  in random order")
    for step in result["curve"]:
        row = Curve(**step)
        ratio = _number(row.ratio, row.ratio_interval)
        random = _number(row.random, row.random_interval)
        count = round(row.share * images)
        log.info(f"  {row.share:>8.0%}  {count:>9}  {_number(row.recall, row.interval)}  {ratio}   {random}")
    for key, name in (("old_recall", result["old_model"]), ("new_recall", result["new_model"])):
        log.info(f"  {name} alone: {_number(result[key]['recall'], result[key]['interval'])}")


def _number(value: float, interval: Interval | list[float] | None) -> str:
    return f"{value:.3f} " + (f"[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else f"({TOO_FEW})")
