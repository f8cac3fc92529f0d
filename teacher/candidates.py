"""Towers to compare: their names and weights as given on the command line, and their networks."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from teacher.config import TowerConfig, TrainConfig
from teacher.model import Teacher, build_teacher, is_fused, load_teacher, read_tower
from teacher.registry import open_clip_name, split_timm_name
from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.store import Artifact, load_artifact, reraise_as_artifact_error
from vpr.common.errors import UserError
from vpr.common.flags import to_flags
from vpr.imaging.preprocess import Preprocess

_TIMM = "timm/"


@dataclass(frozen=True)
class Candidate:
    """Tower with its initial weights.

    Attributes:
        given: Text of the command line.
        config: Configuration that builds the tower in a training.
        tower: Result of :func:`teacher.registry.read_tower`, or the tower recorded in a teacher's card.
        artifact: Teacher with the weights, if they are not a tag, a file or random.
    """

    given: str
    config: TowerConfig
    tower: dict[str, Any]
    artifact: Artifact | None = None

    @property
    def flags(self) -> list[str]:
        """Flags of ``vpr teacher train`` that build this tower; name and weights are always among them."""
        default = TowerConfig()
        others = replace(self.config, name=default.name, pretrained=default.pretrained)
        words = ["--tower.name", self.config.name, "--tower.pretrained", self.config.pretrained]
        return words + to_flags(TrainConfig, {"tower": others})

    @property
    def identity(self) -> tuple[str, str]:
        """Name and weights in one spelling, so that a tower given twice is found."""
        if self.artifact:
            return "", self.artifact.sha256
        name, weights = open_clip_name(self.config.name), self.config.pretrained
        if Path(weights).suffix == ".safetensors":
            return name, str(Path(weights).resolve())
        # The tag of the weights decides, whether the name has it too or not.
        is_tag = name.startswith(_TIMM) and weights
        return (_TIMM + split_timm_name(name)[0] if is_tag else name), weights

    def build(self, seed: int) -> tuple[Teacher, Preprocess]:
        """Return the network in evaluation mode with its weights, and its preprocessing.

        Random weights equal those of a training with this seed.

        Raises:
            UserError: The weights cannot be read or belong to another tower.
        """
        if self.artifact:
            model, artifact = load_teacher(self.artifact.path, self.artifact)
            assert isinstance(model, Teacher)  # `_read_teacher` rejects fused ones
            assert artifact.card.preprocess is not None  # checked by load_teacher
            return model, artifact.card.preprocess
        torch.manual_seed(seed)
        model, preprocess = build_teacher(self.config, self.tower, load_pretrained=True)
        return model.eval(), preprocess


def read_candidates(given: Sequence[str]) -> list[Candidate]:
    """Return the towers; names, tags, files and shapes are checked before any weights are downloaded.

    Raises:
        UserError: A tower is unknown (with the nearest names), given twice, or its weights do not fit.
    """
    candidates: list[Candidate] = []
    seen: dict[tuple[str, str], str] = {}
    for text in given:
        candidate = _read(text)
        if candidate.identity in seen:
            first = seen[candidate.identity]
            same = "is given twice" if first == text else f"is the same tower as {first}"
            raise UserError(f"towers: {text} {same}. Name each tower once.")
        seen[candidate.identity] = text
        candidates.append(candidate)
    return candidates


def _read(text: str) -> Candidate:
    if (Path(text) / CARD_NAME).is_file():
        return _read_teacher(text)
    name, colon, weights = text.partition(":")
    if weights and (teacher := _teacher_of(Path(weights))):
        raise UserError(f"towers: {text} has the weights of a teacher. Give its path alone: {teacher}.")
    try:
        tower = read_tower(name)
        config = TowerConfig(name, weights if colon else str(tower.get("tag", "")))
        # On the device `meta` without memory; a local file is read, since its shapes may be those of another tower.
        is_file = Path(weights).suffix == ".safetensors"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*to a meta parameter")  # nothing is to be copied
            build_teacher(config, tower, load_pretrained=is_file, device="meta")
    except UserError as error:
        raise name_tower(text, error) from None
    return Candidate(text, config, tower)


def _teacher_of(path: Path) -> Path | None:
    """Return the artifact that a path of weights belongs to, if any."""
    return next((folder for folder in (path, path.parent) if (folder / CARD_NAME).is_file()), None)


def name_tower(given: str, error: UserError) -> UserError:
    """Return an error that names the tower in place of the key of a training, which this command does not have."""
    key, _, message = str(error).partition(": ")
    return UserError(f"towers: {given}: {message if key.startswith('tower.') else error}")


def _read_teacher(path: str) -> Candidate:
    artifact = load_artifact(path, "teacher")
    if is_fused(artifact):
        raise UserError(f"towers: {path} holds several teachers, which no training starts from. Name one of them.")
    with reraise_as_artifact_error(artifact):
        network = TowerConfig(**artifact.card.config["network"])
        network = replace(network, mean=tuple(network.mean), std=tuple(network.std))  # lists in JSON
        config = replace(network, pretrained=path, gradient_checkpointing=False, dropout=0.0)
        tower = artifact.card.config["tower_config"]
    return Candidate(path, config, tower, artifact)
