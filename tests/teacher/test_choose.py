from __future__ import annotations

import csv
import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from teacher.candidates import read_candidates
from teacher.choose import TowerScore, _Measured, choose, p_values
from teacher.choose_config import ChooseConfig
from teacher.config import StageConfig, TowerConfig, TrainConfig
from teacher.model import build_teacher, read_tower
from teacher.train import train
from vpr.artifacts.writer import write_artifact
from vpr.cli import main, read_config
from vpr.common.errors import UserError
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import Catalog
from vpr.data.config import CatalogConfig, LoaderConfig
from vpr.data.loaders import ImageDataset
from vpr.retrieval.embeddings import score_split
from vpr.retrieval.metrics import RetrievalScores

TOWERS = ("sample", "sample-vit:", "timm/test_vit")


def path_of(catalog: Catalog) -> str:
    assert catalog.artifact is not None
    return str(catalog.artifact.path)


@pytest.fixture(scope="module")
def rows(pairs_catalog: Catalog) -> list[TowerScore]:
    return choose(ChooseConfig(TOWERS, path_of(pairs_catalog), seed=3))


def test_recall_is_that_of_the_network_of_a_training(rows: list[TowerScore], pairs_catalog: Catalog) -> None:
    """By the loader of the training instead of that of the embeddings, from the flags to paste."""
    validation = pairs_catalog.select(split="validation")
    for row in rows:
        flags = [*shlex.split(row.flags), "--catalog", "c", "--output", "o"]
        config = read_config(TrainConfig, "teacher train", flags).tower
        torch.manual_seed(3)
        model, preprocess = build_teacher(config, read_tower(config.name), load_pretrained=True)
        model.eval()
        pixels = ImageDataset(validation, preprocess).__getitems__(list(range(len(validation))))["pixels"]
        mean, std = (torch.tensor(values)[:, None, None] for values in (preprocess.mean, preprocess.std))
        with torch.no_grad():
            vectors = model((pixels / 255 - mean) / std).numpy()
        scores = score_split(validation, vectors)
        assert row.recall_at_1 == pytest.approx(scores.recall_at_1, abs=1e-9)
        assert row.ci95 == pytest.approx(scores.ci95)
        assert row.parameters == sum(p.numel() for p in model.parameters())


def test_rows_are_sorted_by_recall(rows: list[TowerScore]) -> None:
    recalls = [row.recall_at_1 for row in rows]
    assert recalls == sorted(recalls, reverse=True)
    assert {row.tower for row in rows} == {"sample", "sample-vit", "timm/test_vit"}
    assert rows[0].p_value is None
    assert all(row.images_per_s > 0 and row.multiply_adds > 0 for row in rows)


def test_teacher_is_a_tower_by_its_path_alone(pairs_catalog: Catalog, tmp_path: Path) -> None:
    config = TrainConfig(
        path_of(pairs_catalog), str(tmp_path / "t"), tower=TowerConfig("sample", "", image_size=32),
        stages=(StageConfig("head", 1),), loader=LoaderConfig(batch_size=8),
    )  # fmt: skip
    path = train(config)
    (candidate,) = read_candidates([str(path)])
    assert candidate.flags == ["--tower.name", "sample", "--tower.pretrained", str(path), "--tower.image-size", "32"]
    for given in (f"sample:{path}", f"sample:{path}/model.safetensors"):
        with pytest.raises(UserError, match=r"towers: sample:.* has the weights of a teacher\. Give its path alone"):
            read_candidates([given])


def make_scores(hits: list[int]) -> RetrievalScores:
    """Return scores with one query per product."""
    values = np.array(hits, dtype=bool)
    products = np.array([f"p{index}" for index in range(len(hits))])
    return RetrievalScores(values.mean(), 1, 1, 1, 1, len(hits), len(hits), values, values * 1.0, products)


def test_only_a_clear_difference_shows_a_tower_to_be_worse(pairs_catalog: Catalog) -> None:
    """Of 100 queries, McNemar's z is 5.5 for 30 lost queries, and 0.6 for 12 lost and 9 gained ones."""
    candidate = read_candidates(["sample"])[0]
    best = [1] * 60 + [0] * 40
    hits = [best, [1] * 30 + [0] * 70, [0] * 12 + [1] * 57 + [0] * 31, best]
    measured = [_Measured(candidate, make_scores(values), 1, 1, 1.0) for values in hits]
    first, clear, unclear, equal = p_values(measured)
    assert first is None
    assert clear is not None
    assert clear < 1e-4
    assert (unclear, equal) == (1.0, 1.0)
    pair = p_values(measured[:2])[1]
    assert pair is not None
    assert clear == pytest.approx(pair * 6)  # 12 ordered pairs of four towers, 2 of two


def test_few_products_give_no_test(catalog: Catalog, capsys: pytest.CaptureFixture[str]) -> None:
    rows = choose(ChooseConfig(("sample-vit", "timm/test_vit"), path_of(catalog)))
    assert all(row.ci95 is None and row.p_value is None for row in rows)
    screen = capsys.readouterr().out
    assert "no interval: fewer than 10 products" in screen
    assert f"not shown to be worse than the first: {rows[1].title}" in screen


def save_weights(path: Path, model: str, seed: int) -> Path:
    torch.manual_seed(seed)
    save_file(timm.create_model(model, num_classes=0).state_dict(), path)
    return path


def test_weights_of_a_file_and_of_a_teacher(
    catalog: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save_weights(tmp_path / "weights.safetensors", "test_vit", 8)
    config = TowerConfig("timm/test_vit", "", image_size=64, embedding_dim=16, batch_norm=True, squash=False)
    tower = read_tower(config.name)
    model, preprocess = build_teacher(config, tower, load_pretrained=False)
    teacher = tmp_path / "teacher"
    with write_artifact(teacher, "teacher", {"network": asdict(config), "tower_config": tower}) as draft:
        save_file(model.state_dict(), draft.path / "model.safetensors")
        draft.preprocess = preprocess
    given = (f"timm/test_vit.r160_in1k:{file}", str(teacher))
    rows = choose(ChooseConfig(given, path_of(catalog), output=str(tmp_path / "choose.csv")))
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == rows[0].flags
    assert "its recall may be too high" in captured.err
    by_weights = {row.weights: row for row in rows}
    flags = by_weights[str(teacher)].flags
    tower_flags = [*shlex.split(flags), "--catalog", "c", "--output", "o"]
    read = read_config(TrainConfig, "teacher train", tower_flags).tower
    assert read == replace(config, pretrained=str(teacher))
    rebuilt, same = build_teacher(read, tower, load_pretrained=True)
    assert same == preprocess
    assert all(torch.equal(value, rebuilt.state_dict()[name]) for name, value in model.state_dict().items())
    assert by_weights[str(file)].flags == f"--tower.name timm/test_vit.r160_in1k --tower.pretrained {file}"
    with (tmp_path / "choose.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [line["flags"] for line in table] == [row.flags for row in rows]
    assert [float(line["recall_at_1"]) for line in table] == [row.recall_at_1 for row in rows]


def test_tag_in_the_name_is_the_weights() -> None:
    (tagged,) = read_candidates(["timm/test_vit.r160_in1k"])
    assert tagged.flags == ["--tower.name", "timm/test_vit.r160_in1k", "--tower.pretrained", "r160_in1k"]
    assert read_candidates(["timm/test_vit.r160_in1k:"])[0].config.pretrained == ""


@pytest.mark.parametrize(
    ("towers", "message"),
    [
        (("sample", "timm/resnet50x"), r"towers: timm/resnet50x: .* Nearest names: .*timm/resnet50"),
        (("sample", "sample:"), "towers: sample: is the same tower as sample"),
        (("sample", "sample"), "towers: sample is given twice"),
        (
            ("timm/test_vit.r160_in1k", "timm/test_vit:r160_in1k"),
            r"timm/test_vit:r160_in1k is the same tower as timm/test_vit\.r160_in1k",
        ),
        (("timm/test_vit:nothing",), "towers: timm/test_vit:nothing: timm/test_vit has no tag 'nothing'"),
        (("sample:absent.safetensors",), "towers: sample:absent.safetensors: .* does not exist"),
        ((), "towers: expected one or more, got none"),
    ],
)
def test_wrong_towers_are_found_before_the_catalogue_is_read(towers: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose(ChooseConfig(towers, "no-such-catalogue"))


def test_weights_of_another_tower_are_rejected(tmp_path: Path) -> None:
    file = save_weights(tmp_path / "w.safetensors", "test_resnet", 0)
    with pytest.raises(UserError, match=r"towers: timm/test_vit\.r160_in1k:.*: the weights lack '"):
        choose(ChooseConfig((f"timm/test_vit.r160_in1k:{file}",), "no-such-catalogue"))


def test_split_without_queries_is_rejected(catalog: Catalog, tmp_path: Path, texture_folder: Path) -> None:
    output = tmp_path / "catalog"
    build_catalog(CatalogConfig("folder", str(output), str(texture_folder)))
    with pytest.raises(UserError, match="a validation split is required"):
        choose(ChooseConfig(("sample",), str(output)))
    rows = ["image,product,role,split"]
    rows += [
        f"{path.relative_to(texture_folder)},{path.parent.name},gallery,validation"
        for path in sorted(texture_folder.glob("*/*.jpg"))
    ]
    table = texture_folder / "gallery-only.csv"
    table.write_text("\n".join(rows) + "\n")
    try:
        build_catalog(CatalogConfig("csv", str(output), str(table)))
    finally:
        table.unlink()
    with pytest.raises(UserError, match="none with the role query"):
        choose(ChooseConfig(("sample",), str(output)))


def test_json_is_alone_on_stdout(catalog: Catalog, capsys: pytest.CaptureFixture[str]) -> None:
    main(["teacher", "choose", "--towers", "sample-vit", "--catalog", path_of(catalog), "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert row["flags"] == "--tower.name sample-vit --tower.pretrained ''"
