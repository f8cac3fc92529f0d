from __future__ import annotations

import csv
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vpr.artifacts.store import load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.common.errors import UserError
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import load_catalog
from vpr.data.config import CatalogConfig


def test_unchanged_images_keep_the_artifact(texture_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    shutil.copytree(texture_folder, root)
    config = CatalogConfig(reader="folder", root=str(root), output=str(tmp_path / "c"), test=0.5)
    first = load_artifact(build_catalog(config)).sha256
    assert load_artifact(build_catalog(config)).sha256 == first
    (root / "product-00" / "0.jpg").unlink()
    assert load_artifact(build_catalog(config)).sha256 != first


def test_foreign_output_is_rejected_before_reading(
    texture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with write_artifact(tmp_path / "taken", "ranges", {}):
        pass
    for module in ("intake", "build_catalog"):
        monkeypatch.setattr(f"vpr.data.{module}.check_images", lambda *_: pytest.fail("images were read"))
    for reader in ("folder", "sample"):
        config = CatalogConfig(reader=reader, root=str(texture_folder), output=str(tmp_path / "taken"))  # type: ignore[arg-type]
        with pytest.raises(UserError, match="holds an artifact of kind ranges"):
            build_catalog(config)


def test_unreadable_images_are_listed_with_a_reason(texture_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    for product in ("a", "b"):
        (root / product).mkdir(parents=True)
        (root / product / "1.jpg").write_bytes(
            (texture_folder / "product-00" / "1.jpg").read_bytes() + product.encode()
        )
    (root / "a" / "2.jpg").write_bytes(b"GIF?")
    config = CatalogConfig(reader="folder", root=str(root), output=str(tmp_path / "c"), skip_unreadable=True)
    built = load_artifact(build_catalog(config))
    assert built.card.metrics == {"images": 2, "set_aside": 1}
    assert built.file("set_aside.csv").read_text() == "image,reason\na/2.jpg,not an image\n"


def test_files_without_image_suffix_are_listed(texture_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    shutil.copytree(texture_folder / "product-00", root / "shoe")
    for name in ("shoe/notes.txt", "shoe/1.psd", "README"):
        (root / name).write_bytes(b"?")
    config = CatalogConfig(reader="folder", root=str(root), output=str(root / "catalog"))
    first = load_artifact(build_catalog(config))
    with first.file("set_aside.csv").open(newline="") as stream:
        listed = list(csv.reader(stream))[1:]
    assert listed == [[name, "unknown suffix"] for name in ("README", "shoe/1.psd", "shoe/notes.txt")]
    assert first.card.metrics["set_aside"] == 3
    assert load_artifact(build_catalog(config)).sha256 == first.sha256


@pytest.mark.parametrize("reader", ["folder", "images"])
def test_hidden_files_and_folders_are_listed(texture_folder: Path, tmp_path: Path, reader: str) -> None:
    """Copies of Jupyter would be a product, and forks of macOS unreadable images (torchvision#2831 and #109)."""
    root = tmp_path / "images"
    shutil.copytree(texture_folder / "product-00", root / "shoe")
    hidden = [".ipynb_checkpoints/0.jpg", "__MACOSX/shoe/._0.jpg", "shoe/.DS_Store", "shoe/._0.jpg", "shoe/.old/1.jpg"]
    for name in hidden:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(texture_folder / "product-01" / "0.jpg", root / name)
    (root / "empty").mkdir()  # torchvision#8297
    config = CatalogConfig(reader=reader, root=str(root), output=str(tmp_path / "c"))  # type: ignore[arg-type]
    catalog = load_catalog(build_catalog(config))
    assert [name.split("/")[0] for name in catalog.table["image"].to_pylist()] == ["shoe"] * len(catalog)
    assert len(catalog) == len(list(texture_folder.glob("product-00/*")))
    assert catalog.artifact is not None
    with catalog.artifact.file("set_aside.csv").open(newline="") as stream:
        listed = [row for row in csv.reader(stream) if row[1].endswith("starts with a dot")]
    assert [name for name, _ in listed] == hidden


@pytest.mark.parametrize("reader", ["folder", "images", "webdataset"])
def test_links_to_folders_are_listed(texture_folder: Path, tmp_path: Path, reader: str) -> None:
    """Links are not followed, so their products must not be missing silently."""
    root = tmp_path / "images"
    shutil.copytree(texture_folder / "product-00", root / "shoe")
    with tarfile.open(root / "0.tar", "w") as tar:
        tar.add(root / "shoe" / "0.jpg", "0.jpg")
    for name in ("boots", "boots.jpg", "boots.tar"):
        (root / name).symlink_to(texture_folder / "product-01")
    config = CatalogConfig(reader=reader, root=str(root), output=str(tmp_path / "catalog"))  # type: ignore[arg-type]
    listed = load_artifact(build_catalog(config)).file("set_aside.csv").read_text()
    for name in ("boots", "boots.jpg", "boots.tar"):
        assert f'{name},"a link to a folder, which is not followed"\n' in listed
    assert listed.count("\n") == (4 if reader == "webdataset" else 5)


def test_changed_box_rebuilds_the_catalogue(texture_folder: Path, tmp_path: Path) -> None:
    shutil.copy(texture_folder / "product-00" / "0.jpg", tmp_path / "a.jpg")
    config = CatalogConfig(reader="csv", root=str(tmp_path / "t.csv"), output=str(tmp_path / "c"))
    catalogs = []
    for left in (1, 9):
        (tmp_path / "t.csv").write_text(f"image,product,box_x,box_y,box_w,box_h\na.jpg,shoe,{left},1,5,5\n")
        catalogs.append(load_catalog(build_catalog(config)))
    assert [catalog.box(0) for catalog in catalogs] == [(1, 1, 5, 5), (9, 1, 5, 5)]
    assert catalogs[0].sha256 != catalogs[1].sha256


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"validation": -1.0}, r"together less than 1, got -1\.0 and 0\.0"),
        ({"test": float("nan")}, r"validation, test: expected shares .* got 0\.0 and nan"),
        ({"validation": float("inf")}, "got inf and 0"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
    ],
)
def test_values_out_of_range_are_rejected(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CatalogConfig(reader="folder", root="x", output="y", **values)


def _write_images(root: Path, names: list[str], seed: int = 0) -> None:
    """Write small images, each with other bytes."""
    rng = np.random.default_rng(seed)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / name)


def _splits(config: CatalogConfig) -> dict[str, str]:
    table = load_catalog(build_catalog(config)).table
    return dict(zip(table["product"].to_pylist(), table["split"].to_pylist(), strict=True))


def test_products_of_a_growing_folder_keep_their_split(tmp_path: Path) -> None:
    names = [f"p{product:02}/{view}.png" for product in range(40) for view in range(4)]
    _write_images(tmp_path / "shop", names)
    config = CatalogConfig("folder", str(tmp_path / "c"), str(tmp_path / "shop"), validation=0.15, test=0.25)
    first = _splits(config)
    assert set(first.values()) == {"train", "validation", "test"}
    _write_images(tmp_path / "shop", [f"a{n:02}/{view}.png" for n in range(9) for view in range(3)], seed=1)
    _write_images(tmp_path / "shop", [f"p{product:02}/more.png" for product in range(0, 40, 2)], seed=2)
    second = _splits(config)
    assert len(second) == 49
    assert {product: second[product] for product in first} == first


@pytest.mark.parametrize("folders", [("train", "val", "test"), ("Train", "valid", "TEST"), ("train", "validation")])
def test_folders_named_as_splits_are_splits(
    tmp_path: Path, folders: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"{folder}/{folder[0]}{product}/{view}.png" for folder in folders for product in (1, 2) for view in (1, 2)]
    _write_images(tmp_path / "shop", names)
    config = CatalogConfig("folder", str(tmp_path / "c"), str(tmp_path / "shop"))
    with caplog.at_level("INFO", logger="vpr"):
        catalog = load_catalog(build_catalog(config))
    assert "its folders are splits: " in caplog.text
    known = {"t": "train", "v": "validation", "T": "train"}
    for row in catalog.table.to_pylist():
        folder, product, _ = row["image"].split("/")
        assert row["split"] == ("test" if folder.lower() == "test" else known[folder[0]])
        assert row["product"] == product
    for split in set(catalog.table["split"].to_pylist()) - {"train"}:
        assert set(catalog.select(split=split).roles) == {"gallery", "query"}


@pytest.mark.parametrize("inside", ["", "test/"])
def test_folders_named_as_roles_are_roles(tmp_path: Path, inside: str) -> None:
    """Data sets for retrieval have such folders; as products, they would be three."""
    folders = {
        "train/": ("train", "train"),
        f"{inside}Query/": ("test", "query"),
        f"{inside}gallery/": ("test", "gallery"),
    }
    names = [
        f"{folder}{'b' if 'train' in folder else 'a'}{n}/{view}.png"
        for folder in folders
        for n in (1, 2)
        for view in (1, 2)
    ]
    _write_images(tmp_path / "shop", names)
    catalog = load_catalog(build_catalog(CatalogConfig("folder", str(tmp_path / "c"), str(tmp_path / "shop"))))
    assert set(catalog.products.tolist()) == {"a1", "a2", "b1", "b2"}
    for row in catalog.table.to_pylist():
        folder = next(folder for folder in folders if row["image"].startswith(folder))
        assert (row["split"], row["role"]) == folders[folder]
    _write_images(tmp_path / "shop", [f"{inside}shoes/1.png"], seed=1)
    with pytest.raises(UserError, match=r"are named as splits, but 'shoes' is not"):
        build_catalog(CatalogConfig("folder", str(tmp_path / "c"), str(tmp_path / "shop")))


def test_single_folder_named_as_a_role_is_a_product(tmp_path: Path) -> None:
    _write_images(tmp_path / "shop", ["gallery/1.png", "shoes/1.png"])
    config = CatalogConfig("folder", str(tmp_path / "c"), str(tmp_path / "shop"))
    assert _splits(config) == {"gallery": "train", "shoes": "train"}


def test_folders_that_are_not_all_splits(tmp_path: Path) -> None:
    toys = tmp_path / "toys"
    _write_images(toys, ["train/1.png", "train/2.png", "doll/1.png"])
    config = CatalogConfig("folder", str(tmp_path / "c"), str(toys))
    assert _splits(config) == {"train": "train", "doll": "train"}
    _write_images(toys, ["test/a/1.png"])
    with pytest.raises(UserError, match=r"toys: the folders test, train are named as splits, but 'doll' is not\. Move"):
        build_catalog(config)
    shutil.rmtree(toys / "doll")
    with pytest.raises(UserError, match=r"train/1\.png: it is in no product's folder\. Move it to .*/train/PRODUCT/1"):
        build_catalog(config)


def test_unmet_share_leaves_nothing(tmp_path: Path) -> None:
    _write_images(tmp_path / "shop", ["a/1.png", "a/2.png", "b/1.png", "b/2.png"])
    config = CatalogConfig("folder", str(tmp_path / "c"), str(tmp_path / "shop"), test=0.001)
    with pytest.raises(UserError, match=r"test: 0\.001 selects none of 2 products"):
        build_catalog(config)
    assert not (tmp_path / "c").exists()


def test_summary_counts_splits_and_what_deserves_a_look(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"{number}.png" for number in range(9)]
    _write_images(tmp_path, names)
    (tmp_path / "8.png").write_bytes((tmp_path / "0.png").read_bytes())
    places = ["a,,", "a,,", "b,,", "c,test,query", "c,test,gallery", "c,test,gallery", "d,validation,gallery", "e,,"]
    lines = [f"{name},{place}" for name, place in zip(names, [*places, "f,test,"], strict=True)]
    (tmp_path / "t.csv").write_text("\n".join(["image,product,split,role", *lines]) + "\n")
    with caplog.at_level("INFO", logger="vpr"):
        build_catalog(CatalogConfig("csv", str(tmp_path / "c"), str(tmp_path / "t.csv")))
    assert caplog.messages == [
        f"{tmp_path / 'c'}: 7 images of 5 products, 2 set aside",
        "  split       products  images  queries  gallery",
        "  train              3       3        -        -",
        "  validation         1       1        0        1",
        "  test               1       3        1        2",
        "  products with one image: 4 (3 train, 1 validation)",
        "  images without a label: 0",
        "  set aside: 2 (2 under 2 products; listed in set_aside.csv)",
        "  images under several products: 1, 2 rows set aside (0.png under a, f)",
        "  products without another image: 1, left out (f)",
        "  validation: 1 products as in the data set",
        "  test: 1 products as in the data set",
    ]


def test_catalogue_of_default_values_keeps_its_card(tmp_path: Path) -> None:
    """Catalogues of earlier versions stay up to date."""
    _write_images(tmp_path / "shop", ["a/1.png"])
    config = CatalogConfig("folder", str(tmp_path / "c"), str(tmp_path / "shop"))
    keys = load_artifact(build_catalog(config)).card.config
    assert set(keys) == {"reader", "root", "validation", "test", "seed", "skip_unreadable"}


def _linked_shop(texture_folder: Path, tmp_path: Path) -> Path:
    """A folder of one product, with links to products in two other folders, and a link back to itself."""
    root = tmp_path / "shop"
    shutil.copytree(texture_folder / "product-00", root / "shoe")
    for name, product in (("near", "product-01"), ("far", "product-02")):
        shutil.copytree(texture_folder / product, tmp_path / name / "boots")
        (root / name).symlink_to(tmp_path / name / "boots")
    (tmp_path / "near" / "boots" / "loop").symlink_to(root)
    (root / "again").symlink_to(tmp_path / "near" / "boots")
    (root / "shoe" / "copy.jpg").symlink_to(tmp_path / "near" / "boots" / "0.jpg")
    return root


def test_links_are_followed_into_named_folders_only(texture_folder: Path, tmp_path: Path) -> None:
    root = _linked_shop(texture_folder, tmp_path)
    (root / "shoe" / "copy.jpg").unlink()
    settings = {"reader": "folder", "root": str(root), "output": str(tmp_path / "c")}
    config = CatalogConfig(**settings, follow_links=(str(tmp_path / "near"),))  # type: ignore[arg-type]
    catalog = load_catalog(build_catalog(config))
    followed = {"again", "near"} & set(catalog.products.tolist())
    assert len(followed) == 1  # the second link leads to a folder that is read already
    assert set(catalog.products.tolist()) == {"shoe"} | followed
    listed = load_artifact(tmp_path / "c").file("set_aside.csv").read_text()
    assert sorted(line.split(",")[0] for line in listed.splitlines()[1:]) == sorted(
        ["far", f"{followed.pop()}/loop", *({"again", "near"} - set(catalog.products.tolist()))]
    )
    assert all(catalog.path(row).is_file() for row in range(len(catalog)))


def test_files_are_linked_from_named_folders_only(texture_folder: Path, tmp_path: Path) -> None:
    root = _linked_shop(texture_folder, tmp_path)
    settings = {"reader": "folder", "root": str(root), "output": str(tmp_path / "c")}
    for folders in ((), (str(tmp_path / "far"),)):
        with pytest.raises(UserError, match=r"'shoe/copy\.jpg' leads out of .*--follow-links"):
            build_catalog(CatalogConfig(**settings, follow_links=folders))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"follow_links: .*absent is not a folder"):
        build_catalog(CatalogConfig(**settings, follow_links=(str(tmp_path / "absent"),)))  # type: ignore[arg-type]
