from __future__ import annotations

import csv
import io
import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest

from student.embed import EmbedConfig, embed_catalog
from vpr.common.errors import UserError
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.config import CatalogConfig
from vpr.data.pixels import read_pixels
from vpr.imaging.decode import ImageRejected, read_image
from vpr.imaging.limits import MAX_FILE_BYTES
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.embeddings import load_embeddings

Member = tuple[str, bytes]


def write_shard(path: Path, members: list[Member | tarfile.TarInfo], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def write_shards(folder: Path, root: Path, per_shard: int) -> Path:
    """Write the images of a folder reader as shards with ``.json`` labels, in the same order."""
    files = sorted(root.rglob("*.jpg"))
    for number, start in enumerate(range(0, len(files), per_shard)):
        members: list[Member | tarfile.TarInfo] = []
        for offset, file in enumerate(files[start : start + per_shard]):
            key = f"{start + offset:06d}"
            members += [(f"{key}.jpg", file.read_bytes())]
            members += [(f"{key}.json", json.dumps({"product": file.parent.name}).encode())]
        write_shard(folder / f"textures-{number:04d}.tar", members)
    return folder


def build(root: Path, output: Path, reader: str = "webdataset", **settings: object) -> Catalog:
    config = CatalogConfig(reader=reader, root=str(root), output=str(output), **settings)  # type: ignore[arg-type]
    return load_catalog(build_catalog(config))


def read_rejected(catalog: Catalog) -> dict[str, str]:
    assert catalog.artifact is not None
    with catalog.artifact.file("set_aside.csv").open(newline="", encoding="utf-8") as stream:
        return {row["image"]: row["reason"] for row in csv.DictReader(stream)}


@pytest.fixture
def image(texture_folder: Path) -> bytes:
    return (texture_folder / "product-00" / "0.jpg").read_bytes()


def test_shards_equal_the_folder_reader(texture_folder: Path, student_artifact: Path, tmp_path: Path) -> None:
    shards = build(
        write_shards(tmp_path / "shards", texture_folder, 50), tmp_path / "a", validation=0.25, test=0.25, seed=35
    )
    folder = build(texture_folder, tmp_path / "b", "folder", validation=0.25, test=0.25, seed=35)
    for column in ("product", "split", "role", "sha256"):
        assert shards.table[column].to_pylist() == folder.table[column].to_pylist()
    preprocess = Preprocess(size=32)
    rows = range(len(folder))
    assert np.array_equal(read_pixels(shards, preprocess, rows), read_pixels(folder, preprocess, rows))
    vectors = []
    for name in ("a", "b"):
        config = EmbedConfig(str(student_artifact), str(tmp_path / name), str(tmp_path / f"{name}-vectors"))
        vectors.append(load_embeddings(embed_catalog(config)).vectors)
    assert np.array_equal(vectors[0], vectors[1])
    assert len(list((tmp_path / "shards").iterdir())) == 3  # nothing is unpacked


def test_sample_with_several_images_and_all_labels(image: bytes, tmp_path: Path) -> None:
    label = {"product": 7, "category": "shoes", "role": "query", "split": "test", "box": [4, 5, 20, 30]}
    other = image + b"\0"  # other bytes, since an image is not in two splits
    members: list[Member | tarfile.TarInfo] = [
        ("./a/1.left.jpg", image),
        ("./a/1.JPG", image),
        ("./a/1.json", json.dumps(label).encode()),
        ("./b/1.jpg", other),
        ("./b/1.cls", b"12\n"),
    ]
    catalog = build(write_shard(tmp_path / "s" / "in" / "0.tar", members).parent.parent, tmp_path / "c")
    assert [image.rpartition("+")[2].partition("/")[2] for image in catalog.table["image"].to_pylist()] == [
        "a/1.left.jpg",
        "a/1.JPG",
        "b/1.jpg",
    ]
    assert catalog.products.tolist() == ["7", "7", "12"]
    assert catalog.roles.tolist() == ["query", "query", "train"]
    assert catalog.categories.tolist() == ["shoes", "shoes", ""]
    assert [catalog.box(row) for row in range(3)] == [(4.0, 5.0, 20.0, 30.0)] * 2 + [None]
    assert {read_image(catalog.path(row)) for row in range(3)} == {image, other}


def test_shards_without_labels_are_unlabelled_images(image: bytes, tmp_path: Path) -> None:
    write_shard(tmp_path / "s" / "0.tar", [("1.jpg", image), ("2.jpg", image)])
    catalog = build(tmp_path / "s", tmp_path / "c")
    assert len(set(catalog.products.tolist())) == 2
    assert catalog.table["source"].to_pylist() == ["unlabelled"] * 2
    write_shard(tmp_path / "s" / "1.tar", [("3.jpg", image), ("3.cls", b"shoe")])
    with pytest.raises(UserError, match=r"1\.tar: sample '/3' has no product, or is the only one .*\. Label all"):
        build(tmp_path / "s", tmp_path / "c")


def _special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_hostile_members_are_set_aside_with_a_reason(image: bytes, tmp_path: Path, form: int) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(image)
    long = "x" * 2000 + ".jpg"
    members: list[Member | tarfile.TarInfo] = [
        ("good.jpg", image),
        ("../out.jpg", image),
        (f"{tmp_path}/absolute.jpg", image),
        ("in/../../out.jpg", image),
        _special("soft.jpg", tarfile.SYMTYPE, str(secret)),
        _special("hard.jpg", tarfile.LNKTYPE, "good.jpg"),
        _special("pipe.jpg", tarfile.FIFOTYPE),
        _special("device.jpg", tarfile.CHRTYPE),
        _special("folder.jpg", tarfile.DIRTYPE),
        ("new\nline.jpg", image),
        ("not-utf8-\udcff.jpg", image),
        (long, image),
        ("._good.jpg", b"a fork"),
        ("letter.psd", b"?"),
        ("text.jpg", b"<html>"),
    ]
    root = write_shard(tmp_path / "s" / "0.tar", members, form).parent
    with pytest.raises(ImageRejected, match=r"0\.tar#\d+\+6/text\.jpg: not an image"):
        build(root, tmp_path / "c")
    catalog = build(root, tmp_path / "c", skip_unreadable=True)
    assert [image.split("/")[-1] for image in catalog.table["image"].to_pylist()] == ["good.jpg"]
    reasons = {name.partition(".tar")[2]: reason for name, reason in read_rejected(catalog).items()}
    assert reasons.pop(next(name for name in reasons if name.endswith("/text.jpg"))) == "not an image"
    assert reasons == {
        "/../out.jpg": "its name leads out of the shard",
        f"/{tmp_path}/absolute.jpg": "its name leads out of the shard",
        "/in/../../out.jpg": "its name leads out of the shard",
        "/soft.jpg": "a link",
        "/hard.jpg": "a link",
        "/pipe.jpg": "not a regular file",
        "/device.jpg": "not a regular file",
        "/new\\nline.jpg": "its name has unprintable characters, or more than 1024",
        "/not-utf8-\\udcff.jpg": "its name has unprintable characters, or more than 1024",
        f"/{long[:1024]}": "its name has unprintable characters, or more than 1024",
        "/._good.jpg": "its name starts with a dot",
        "/letter.psd": "unknown suffix",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "s", "secret.jpg"]


def test_oversized_members_are_set_aside_unread(image: bytes, tmp_path: Path) -> None:
    large = tarfile.TarInfo("large.jpg")
    large.size = MAX_FILE_BYTES + 1
    label = tarfile.TarInfo("good.json")
    label.size = (1 << 20) + 1
    shard = tmp_path / "s" / "0.tar"
    shard.parent.mkdir()
    with shard.open("wb") as stream:
        for info in (large, label):
            stream.write(info.tobuf())
            stream.seek(-(-info.size // 512) * 512, io.SEEK_CUR)  # a hole
        info = tarfile.TarInfo("good.jpg")
        info.size = len(image)
        stream.write(info.tobuf() + image + bytes(-len(image) % 512) + bytes(1024))
    catalog = build(tmp_path / "s", tmp_path / "c")
    assert len(catalog) == 1
    sizes = f"{MAX_FILE_BYTES + 1} bytes, more than {MAX_FILE_BYTES}", f"{(1 << 20) + 1} bytes, more than {1 << 20}"
    assert read_rejected(catalog) == {"0.tar/large.jpg": sizes[0], "0.tar/good.json": sizes[1]}


def _pax(records: bytes, image: bytes) -> bytes:
    """Return a tar file of an image after an extended header."""
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    info = tarfile.TarInfo("a.jpg")
    info.size = len(image)
    blocks = [header.tobuf(), records + bytes(-len(records) % 512), info.tobuf(), image + bytes(-len(image) % 512)]
    return b"".join(blocks) + bytes(1024)


def _negative(image: bytes) -> bytes:
    block = bytearray(tarfile.TarInfo("a.jpg").tobuf())
    block[124:136] = b"\xff" * 10 + b"\xfc\x00"  # -1024, in base 256
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + image + bytes(2048)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("truncated in a member", "unexpected end of data"),
        ("truncated in a header", "no end mark after its last member"),
        ("truncated after a member", "no end mark after its last member"),
        ("header overwritten", "no end mark after its last member"),
        ("not a tar", "truncated or broken tar"),
        ("negative size", "truncated or broken tar"),
        ("negative size, extended", "truncated or broken tar"),
        ("huge extended header", "a header of 2097152 bytes"),
        ("endless extended header", "truncated or broken tar"),
    ],
)
def test_broken_shards_are_rejected_by_name(image: bytes, tmp_path: Path, name: str, reason: str) -> None:
    shard = write_shard(tmp_path / "s" / "0.tar", [("a.jpg", image), ("b.jpg", image)])
    data, member = shard.read_bytes(), 512 + -(-len(image) // 512) * 512
    broken = {
        "truncated in a member": data[: member + 600],
        "truncated in a header": data[: member + 100],
        "truncated after a member": data[: 2 * member],
        "header overwritten": data[:member] + b"?" * 512 + data[member + 512 :],
        "not a tar": b"<html>" * 500,
        "negative size": _negative(image),
        "negative size, extended": _pax(b"15 size=-10240\n", image),
        "huge extended header": _pax(b"2097152 comment=".ljust(2097151, b"x") + b"\n", image),
        "endless extended header": b"".join(_pax(b"12 path=abc\n", b"")[:1024] for _ in range(5000)),
    }
    shard.write_bytes(broken[name])
    with pytest.raises(
        UserError, match=r"0\.tar: truncated or broken tar \(.*\)\. Copy or write the shard again"
    ) as raised:
        build(tmp_path / "s", tmp_path / "c")
    assert reason in str(raised.value)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (b"[]", "is not an object"),
        (b"{", "is not an object"),
        (b"[" * 100_000, "is not an object"),
        (b'{"product": true}', "label True is not text or an integer"),
        (b'{"product": 4.5}', "label 4.5 is not text or an integer"),
        (b'{"product": NaN}', "label nan is not text or an integer"),
        (b'{"product": null}', "label None is not text or an integer"),
        (b'{"product": "a", "product": "b"}', "the key 'product' is there twice"),
        (b'{"product": "a", "Role": "query", "ROLE": "query"}', "several columns are named 'role'"),
        (b'{"product": "a\\nb"}', "label 'a\\\\nb' is not text"),
        (b'{"product": "\\ud800"}', "is not text"),
        (b'{"product": ""}', "is not text"),
        (b'{"product": "p", "box": [1, 2, 3]}', "is not four numbers"),
        (b'{"product": "p", "box": 4}', "is not an object with text values, and a box of four numbers"),
        (b'{"product": "p", "role": "gallry"}', r"0\.tar: sample '.*': role 'gallry' is not known"),
    ],
)
def test_broken_labels_are_rejected(image: bytes, tmp_path: Path, label: bytes, message: str) -> None:
    write_shard(tmp_path / "s" / "0.tar", [("a.jpg", image), ("a.json", label)])
    with pytest.raises(UserError, match=message):
        build(tmp_path / "s", tmp_path / "c")


@pytest.mark.parametrize("name", ["cls", "json"])
def test_labels_that_are_not_utf8_are_rejected(tmp_path: Path, name: str) -> None:
    """Two products in Latin-1 would become one, since both letters would be replaced by the same sign."""
    members: list[Member | tarfile.TarInfo] = []
    for number, product in enumerate((b"caf\xe9", b"caf\xe8")):
        label = product if name == "cls" else b'{"product": "' + product + b'"}'
        members += [(f"{number}.jpg", b"?"), (f"{number}.{name}", label)]
    write_shard(tmp_path / "s" / "0.tar", members)
    with pytest.raises(
        UserError, match=rf"0\.tar: sample '/0': its \.{name} is not .*\. Rewrite the shard\.$"
    ) as raised:
        build(tmp_path / "s", tmp_path / "c")
    assert "\n" not in str(raised.value)


def _write_labels(folder: Path, image: bytes, labels: list[dict[str, object]]) -> Path:
    members: list[Member | tarfile.TarInfo] = []
    for number, label in enumerate(labels):
        members += [(f"{number}.jpg", image + bytes([number])), (f"{number}.json", json.dumps(label).encode())]
    return write_shard(folder / "0.tar", members).parent


def test_keys_and_numbers_are_read_as_in_tables(image: bytes, tmp_path: Path) -> None:
    labels: list[dict[str, object]] = [{"product": 4}, {"Product": 4.0, " BOX ": [1, 2, 20, 30]}, {"product": "4.0"}]
    catalog = build(_write_labels(tmp_path / "s", image, labels), tmp_path / "c")
    assert catalog.products.tolist() == ["4", "4", "4"]
    assert [catalog.box(row) for row in range(3)] == [None, (1.0, 2.0, 20.0, 30.0), None]


def test_keys_that_are_not_read_are_listed(image: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A box, split or product under another key would be ignored without a word."""
    caplog.set_level(logging.INFO)
    logging.getLogger("vpr").propagate = True
    labels: list[dict[str, object]] = [
        {"product": "a", "bbox": [1, 2, 20, 30], "Subset": "test"},
        {"product": "b", "bbox": [1, 2, 20, 30], "price": 3},
    ]
    build(_write_labels(tmp_path / "s", image, labels), tmp_path / "c")
    assert "keys of labels that are not read: bbox, Subset, price" in caplog.text
    assert "key 'bbox' may hold boxes, which are not used: rename it to 'box'" in caplog.text
    assert "key 'Subset' may hold splits, which are not used: rename it to 'split'" in caplog.text
    assert "may hold products" not in caplog.text
    build(_write_labels(tmp_path / "t", image, [{"sku": "a"}, {"sku": "b"}]), tmp_path / "d")
    assert "key 'sku' may hold products, which are not used: rename it to 'product'" in caplog.text


def test_labels_have_roles_and_splits_in_any_case_or_none(image: bytes, tmp_path: Path) -> None:
    labels = [{"role": "Query", "split": "TEST"}, {"role": None, "split": "", "category": None}]
    members: list[Member | tarfile.TarInfo] = []
    for number, label in enumerate(labels):
        members += [
            (f"{number}.jpg", image + bytes([number])),
            (f"{number}.json", json.dumps({"product": f"p{number}"} | label).encode()),
        ]
    write_shard(tmp_path / "shop" / "0.tar", members)
    table = build(tmp_path / "shop", tmp_path / "c").table
    assert table["role"].to_pylist() == ["query", "train"]
    assert table["split"].to_pylist() == ["test", "train"]


def test_compressed_shards_and_links_are_rejected(image: bytes, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "0.tar").symlink_to(write_shard(tmp_path / "elsewhere.tar", [("a.jpg", image)]))
    with pytest.raises(UserError, match=r"'0\.tar' leads out of"):
        build(tmp_path / "s", tmp_path / "c")
    (tmp_path / "s" / "0.tar").rename(tmp_path / "s" / "0.tar.gz")
    (tmp_path / "s" / "0.tar.gz").unlink()
    (tmp_path / "s" / "0.tar.gz").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"0\.tar\.gz: images are only read from uncompressed \.tar shards\. Run gunzip"
    ):
        build(tmp_path / "s", tmp_path / "c")


def test_files_of_macos_end_no_sample(image: bytes, tmp_path: Path) -> None:
    """The tar of macOS puts a file ``._NAME`` ahead of each, so that no label was next to its image."""
    members: list[Member | tarfile.TarInfo] = []
    for name, data in (("1.jpg", image), ("1.JSON", b'{"product": "a"}'), ("2.JPG", image + b"\0"), ("2.cls", b"b")):
        members += [(f"./._{name}", b"\0\5\x16\7"), (f"./{name}", data)]
    write_shard(tmp_path / "s" / "._0.tar", [("1.jpg", image)])
    catalog = build(write_shard(tmp_path / "s" / "0.tar", members).parent, tmp_path / "c")
    assert catalog.products.tolist() == ["a", "b"]
    assert len(read_rejected(catalog)) == 5


@pytest.mark.parametrize(
    ("names", "message"),
    [
        # webdataset#237: the key is `1 v2` in all three.
        (("1 v2.0.jpg", "1 v2.0.json", "1 v2.5.jpg"), r"'1 v2\.0\.json' is no label, .* ends at its first dot"),
        # webdataset#157: an image would get the label of another one.
        (("1.jpg", "1.json", "1.jpg", "1.json"), r"'1\.json' is there twice with different labels"),
        # webdataset#11 and #140: labels that are not next to their images.
        (
            ("1.jpg", "2.jpg", "1.json", "2.json"),
            r"no image has a label, .* such as 0\.tar/2 have no image next to them",
        ),
    ],
)
def test_labels_that_belong_to_no_image_are_rejected(
    image: bytes, tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    """Otherwise, the images would be unlabelled, or have the product of others."""
    members: list[Member | tarfile.TarInfo] = []
    for number, name in enumerate(names):
        label = json.dumps({"product": f"p{number}"}).encode()
        members.append((name, label if name.endswith("json") else image + bytes([number])))
    with pytest.raises(UserError, match=message):
        build(write_shard(tmp_path / "s" / "0.tar", members).parent, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_other_json_files_of_a_sample_are_no_labels(image: bytes, tmp_path: Path) -> None:
    members: list[Member | tarfile.TarInfo] = [("1.jpg", image), ("1.meta.json", b"{}"), ("1.left.jpg", image)]
    catalog = build(write_shard(tmp_path / "s" / "0.tar", members).parent, tmp_path / "c")
    assert read_rejected(catalog) == {"0.tar/1.meta.json": "unknown suffix"}


def test_shard_truncated_after_the_build_is_rejected(image: bytes, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s" / "0.tar", [("a.jpg", image)])
    catalog = build(tmp_path / "s", tmp_path / "c")
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(ImageRejected, match=r"a\.jpg: its file ends before the image does"):
        read_image(catalog.path(0))
    with pytest.raises(ImageRejected, match="more than"):
        read_image(Path(f"{shard}#512+{MAX_FILE_BYTES + 1}/a.jpg"))
    with pytest.raises(ImageRejected):
        read_image(Path(f"{shard}#{'9' * 15}+9/a.jpg"))
    with pytest.raises(ImageRejected, match="No such file"):
        read_image(tmp_path / "s" / "other.tar#512+9" / "a.jpg")
