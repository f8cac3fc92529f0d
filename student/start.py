"""Model that a student starts from: a ViT by name, or the artifact of a student or a teacher."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from student.config import LAYER_KEYS, SIZES, DistillConfig, StudentConfig
from student.model import read_student
from student.network_stem import is_network, network_shape, network_weights
from student.pretrained_vit import State, UnsupportedVit, Vit, read_vit, vit_shape, vit_weights
from teacher.fused import FusedTeacher
from teacher.licence import weights_licences
from teacher.model import Teacher, build_teacher, load_teacher
from teacher.registry import read_tower
from teacher.tower_config import TowerConfig
from teacher.train import identify_init_weights
from teacher.weights import MissingProjection, read_tower_weights
from vpr.artifacts.card import UNKNOWN_LICENCE
from vpr.artifacts.store import Artifact, load_artifact
from vpr.common.errors import UserError

HEAD_WEIGHT = "vit.mlp_head.weight"
# Weights must cover these sizes of the student.
_COVERED = {"student": ("dim",), "vit": ("dim", "depth", "heads", "dim_head", "mlp_dim"), "network": ()}
_POSITIONS = ("pos_embed", "positional_embedding", "position_embeddings", "position_embedding.weight")
_MAX_PREFIX = 8  # class, distillation and register tokens before the positions of the grid
# Keys in the messages of `teacher`, as keys of a distillation.
_KEYS = (
    ("tower.pretrained", "start_weights"),
    ("tower.name", "start"),
    ("tower.image_size", "model.image_size"),
)


@dataclass(frozen=True)
class Start:
    """Weights that a student starts from.

    Attributes:
        name: Name of the model or path of the artifact, for messages.
        shape: Shape of the student that the weights fit as they are.
        weights: Weights under the names of a student.
        statistics: ``mean`` and ``std`` of the images that the model expects.
        artifact: Artifact of the weights, None for a model of a library.
        kind: What the weights are: those of a student, of a ViT, or of a convolutional network that becomes the stem.
        reference: Network from (batch, 3, size, size) to the (batch, dim) features before the head; of a ViT only.
        values: JSON values that identify the weights in the card.
        licences: Licences of weights that have no artifact.
    """

    name: str
    shape: StudentConfig
    weights: State
    statistics: dict[str, Any]
    kind: Literal["student", "vit", "network"]
    artifact: Artifact | None = None
    reference: nn.Module | None = None
    values: dict[str, Any] = field(default_factory=dict)
    licences: tuple[str, ...] = ()

    @property
    def has_new_head(self) -> bool:
        """Whether the weights have no head, so that a student begins with a new one."""
        return HEAD_WEIGHT not in self.weights

    @property
    def is_student(self) -> bool:
        """Whether the weights are a student's."""
        return self.kind == "student"


def load_start(config: DistillConfig) -> Start | None:
    """Load the model in ``start``, None if there is none.

    Raises:
        UserError: The model or its weights do not exist, do not fit, or are of another family.
    """
    if not config.start:
        return None
    return _load_named(config) if config.names_start else read_start(load_artifact(config.start))


def read_start(artifact: Artifact) -> Start:
    """Read a student or a teacher artifact; raise :class:`UserError` for other artifacts and unsupported towers."""
    path, kind, preprocess = artifact.path, artifact.card.kind, artifact.card.preprocess
    if kind not in ("student", "teacher"):
        raise UserError(f"start: {path} is a {kind} artifact. Use a student or a teacher.")
    statistics = {} if preprocess is None else {"mean": preprocess.mean, "std": preprocess.std}
    if kind == "student":
        return Start(str(path), *read_student(artifact), statistics, "student", artifact)
    teacher, _ = load_teacher(path, artifact)
    if isinstance(teacher, FusedTeacher):
        raise UserError(f"start: {path} holds several teachers. Start from one of them.")
    visual: Any = teacher.visual
    tower = artifact.card.config["tower_config"]
    if is_network(tower):
        shape = network_shape(tower, visual.image_size)
        return Start(str(path), shape, network_weights(visual), statistics, "network", artifact)
    vit = _read_vit(visual, str(path))
    weights = vit_weights(replace(vit, head=_compose_head(teacher, vit)))
    return Start(str(path), _shape_of(vit, str(path)), weights, statistics, "vit", artifact, _trunk(visual))


def resolve_model(model: StudentConfig, start: Start) -> StudentConfig:
    """Return the complete shape of a student: what the start decides, and what the configuration does.

    The student's layers compute as those of the start. The preset ``auto`` takes the start's sizes too.

    Raises:
        UserError: The shape needs other layers than those of the start, or is larger.
    """
    shape = start.shape
    takes_all = model.preset == "auto" or not start.is_student
    values: dict[str, Any] = {"registers": model.registers or shape.registers}
    if not takes_all and model.family != shape.family:
        raise UserError(f"start: {start.name} has the family '{shape.family}'. Set model.family to it.")
    for key in (*LAYER_KEYS, *(("stem", "family") if takes_all else ())):
        value, own = getattr(model, key), getattr(shape, key)
        if value not in (own, getattr(StudentConfig, key)):
            raise UserError(f"model.{key}: start {start.name} has {own}, got {value}. Set it to {own}.")
        values[key] = own
    if model.preset == "auto":
        values |= {key: getattr(model, key) or getattr(shape, key) for key in SIZES}
    values["pool"] = shape.pool if model.pool == "auto" else model.pool
    resolved = replace(model, **values)
    for key in _COVERED[start.kind]:
        size, own = getattr(resolved, key), getattr(shape, key)
        if own < size:
            fix = f"Lower model.{key}, or use a larger model"
            raise UserError(f"start: {start.name} is smaller than the student, with {key} {own} of {size}. {fix}.")
    if not start.is_student and resolved.heads == 1 and resolved.dim_head == resolved.dim:
        problem = f"one head of the tokens' width {resolved.dim} has no output projection in vit-pytorch"
        raise UserError(f"model.heads: {problem}. Raise model.heads or model.dim.")
    return resolved


def _load_named(config: DistillConfig) -> Start:
    """Load a model of timm or open_clip, in the student's image size if it has the same patches.

    Shape and licence are checked before weights are loaded.
    """
    name = config.start
    with _with_keys_of_distillation(config):
        tower = read_tower(name)
        pretrained = config.start_weights or str(tower.get("tag", ""))
        if not pretrained:
            fix = "Set it to a tag of the library, a .safetensors file or a teacher"
            raise UserError(f"start_weights: no weights of {name} are given. {fix}.")
        init = identify_init_weights(pretrained)
        artifact = init if isinstance(init, Artifact) else None
        # The file of a teacher artifact is that teacher, of which the card records mean and std.
        weights_path = pretrained if artifact is None else str(artifact.path)
        network = TowerConfig(name=name, pretrained=weights_path, interpolation="bicubic")
        licences = _licences(network, tower, artifact, config.require_licence)
        described, preprocess = build_teacher(network, tower, load_pretrained=False, device="meta")
        shape = _shape_of_tower(described.visual, tower, name)
        statistics = {"mean": preprocess.mean, "std": preprocess.std}
        kind: Literal["vit", "network"] = "network" if shape.has_network_stem else "vit"
        model = resolve_model(config.model, Start(name, shape, {}, statistics, kind))
        if kind == "vit" and model.patch_size == shape.patch_size and model.image_size != shape.image_size:
            network = replace(network, image_size=model.image_size)
        visual = _load_visual(network, tower)
    values = {"start_tower": tower, **({"start_sha256": init} if isinstance(init, str) and init else {})}
    if kind == "network":
        return Start(name, shape, network_weights(visual), statistics, kind, artifact, None, values, licences)
    vit = _read_vit(visual, name)
    shape, weights = _shape_of(vit, name), vit_weights(vit)
    return Start(name, shape, weights, statistics, kind, artifact, _trunk(visual), values, licences)


def _shape_of_tower(visual: Any, tower: dict[str, Any], name: str) -> StudentConfig:
    if is_network(tower):
        return network_shape(tower, visual.image_size)
    return _shape_of(_read_vit(visual, name), name)


def _load_visual(network: TowerConfig, tower: dict[str, Any]) -> Any:
    """Return the image tower with its weights, without its projection if the weights have none."""
    try:
        teacher, _ = build_teacher(network, tower, load_pretrained=True)
    except MissingProjection:
        teacher, _ = build_teacher(replace(network, keep_projection=False), tower, load_pretrained=True)
    return teacher.eval().visual


def _licences(
    network: TowerConfig, tower: dict[str, Any], artifact: Artifact | None, require_licence: bool
) -> tuple[str, ...]:
    """Return the licences of weights that have no artifact.

    Raises:
        UserError: A licence is required and not recorded.
    """
    if artifact is not None:
        return ()
    licences = weights_licences(network, tower)
    if require_licence and not licences:
        fix = "Use a tag that records one, or a teacher trained with --tower.licence"
        raise UserError(f"start_weights: '{network.pretrained}' records no licence. {fix}.")
    return tuple(licences or [UNKNOWN_LICENCE])


def _read_vit(visual: Any, name: str) -> Vit:
    try:
        return read_vit(visual)
    except UnsupportedVit as error:
        raise _unsupported(name, error) from None


def _shape_of(vit: Vit, name: str) -> StudentConfig:
    try:
        return vit_shape(vit)
    except UnsupportedVit as error:
        raise _unsupported(name, error) from None


def _unsupported(name: str, error: UnsupportedVit) -> UserError:
    return UserError(f"start: {name} {error}. Use a plain ViT or a convolutional network of timm.")


def _trunk(visual: Any) -> nn.Module:
    """Return the network up to the pooled features; the projection of a tower is removed."""
    trunk = getattr(visual, "trunk", None)
    if trunk is None:
        visual.proj = None
    reference: nn.Module = visual if trunk is None else trunk
    return reference.requires_grad_(False).eval()


def _compose_head(teacher: Teacher, vit: Vit) -> tuple[Tensor, Tensor | None] | None:
    """Return one linear for the tower's projection and those of the teacher, or None without any."""
    linear, norm = (getattr(teacher.project, name, None) for name in ("linear", "norm"))
    if linear is None and norm is None:
        return vit.head
    weight, bias = vit.head or (torch.eye(vit.patches.out_channels), None)
    if linear is not None:
        weight, bias = linear.weight @ weight, None if bias is None else linear.weight @ bias
    if norm is not None:
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        shift = norm.running_mean if bias is None else norm.running_mean - bias
        weight, bias = weight * scale[:, None], norm.bias - shift * scale
    return weight, bias


@contextmanager
def _with_keys_of_distillation(config: DistillConfig) -> Iterator[None]:
    """Raise errors of a teacher's tower under the keys of a distillation."""
    try:
        yield
    except UserError as error:
        text = str(error)
        if text.startswith(("tower.mean:", "tower.std:")):
            problem = f"published weights of {config.start} expect images of different mean and std"
            fix = "add the tag to start" if config.start.startswith("timm/") else "to a teacher trained from the file"
            text = f"start_weights: {problem}. Set it to a tag, or {fix}."
        if text.startswith("tower.pretrained:"):
            text = _explain_positions(Path(config.start_weights)) or text
        for key, own in _KEYS:
            text = text.replace(key, own)
        raise UserError(text) from None


def _explain_positions(path: Path) -> str:
    """Return a message if the positions in a file are no square grid, which cannot be resampled; else nothing."""
    try:
        weights = read_tower_weights(path)
    except UserError:
        return ""
    for name, value in weights.items():
        tokens = value.shape[-2] if name.endswith(_POSITIONS) and value.ndim > 1 else 0
        counts = range(min(tokens, _MAX_PREFIX))
        if tokens and not any(math.isqrt(tokens - count) ** 2 == tokens - count for count in counts):
            problem = f"the {tokens} positions '{name}' are no square grid and cannot be resampled"
            return f"start_weights: {path}: {problem}. Use weights for square images."
    return ""
