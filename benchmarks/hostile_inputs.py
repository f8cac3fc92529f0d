"""Tables, shards, links, recipes, names and model files that attack whoever reads them, laid into a folder.

The folder is that of a case of :mod:`benchmarks.hostile_worker`: ``in`` holds the good picture ``0/0.png``, ``shop``
more of them, and beside them lie the artifacts of :mod:`benchmarks.fuzz_routes`.
"""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import onnx
from onnx import TensorProto
from PIL import Image

from benchmarks.fuzz_routes import sign
from benchmarks.hostile_pictures import encoded
from benchmarks.mutated_files import written

Put = Callable[[Path], None]
Data = bytes | str
_GIB = 1 << 30
# Where a file that climbs out would lie; the run sees what is written anywhere around its folder.
_CLIMBS = ("../escaped.png", "../../escaped.png", "a/../../escaped.png", "/tmp/escaped.png", "a/../../../escaped.png")
_LEADS = (*_CLIMBS, "..", ".", "../shop", "a\0b.png", "/etc/passwd", "/dev/zero", "/proc/self/mem", "x" * 5000)
_HUGE: tuple[Any, ...] = (-1, 2**31, 2**63, 10**30, 10**400, 1e308, float("inf"), float("nan"), "9" * 5000, [], None)
NAMES = (
    *("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</td></table><h1>x", "'\"><svg onload=alert(1)>"),
    *("{{ 7*7 }}", "{% include '/etc/passwd' %}", "&lt;b&gt;", "javascript:alert(1)", "<!--", "]]>", "</script><b>"),
    *("![x](http://example.com/x.png)", "[x](javascript:alert(1))", "| a | b |", "`x`", "$\\input{/etc/passwd}$"),
    *("\u202egnp.exe", "x" * 20_000, "a\u0000b", "\x1b[2J\x1b]0;x\x07", "=HYPERLINK(1)", "<style>*{display:none}"),
)


@dataclass(frozen=True)
class Hostile:
    """Input that attacks.

    Attributes:
        kind: of the attack, as the table of results groups them.
        name: what it does.
        expected: ``set aside`` is for members of a shard and files of a folder.
        roads: of :data:`benchmarks.hostile_routes.ROADS` that it takes.
        put: lays it into a folder.
    """

    kind: str
    name: str
    expected: Literal["taken", "refused", "set aside"]
    roads: tuple[str, ...]
    put: Put


def inputs() -> list[Hostile]:
    """All of them; no two of a name."""
    makers = (_tables, _paths, _links, _shards, _recipes, _names, _graphs, _weights, _cards, _towers)
    return [one for maker in makers for one in maker()]


def _write(name: str, data: Data | Callable[[], Data], folder: Path) -> None:
    """What is large is made when it is written: the process that reads it is to hold nothing else."""
    path = folder / name
    data = data() if callable(data) else data
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data)


def _sparse(head: bytes, size: int, tail: bytes, folder: Path) -> None:
    """A table of a gigabyte that takes no room on the disk: between its ends are zeros."""
    _write("in/table.csv", head, folder)
    with (folder / "in" / "table.csv").open("ab") as stream:
        stream.seek(size)
        stream.write(tail)


def _tables() -> Iterator[Hostile]:
    head, row = "image,product\n", "0/0.png,x\n"
    for name, start in (("in a cell", "0/0.png,"), ("quoted", '0/0.png,"'), ("in the first column", "")):
        put = partial(_sparse, (head + start).encode(), _GIB, b"\n")
        yield Hostile("CSV", f"a line of 1 GB {name}", "refused", ("catalog csv",), put)
    yield Hostile(
        "CSV", "1 GB of heading", "refused", ("catalog csv",), partial(_sparse, b"image,product,", _GIB, b"\n")
    )
    texts: dict[str, Data | Callable[[], Data]] = {
        "60 MB of commas": lambda: head + "0/0.png,x" + "," * 60_000_000 + "\n",
        "5 million lines in a row": lambda: head + "0/0.png,x" + ',"\n"' * 5_000_000 + "\n",
        "400,000 columns": lambda: "image,product," + ",".join(f"c{n}" for n in range(400_000)) + "\n" + row * 2000,
        "a quote that never ends": lambda: head + '0/0.png,"' + "a\n" * 3_000_000,
        "a line break in a product": head + '0/0.png,"a\nb"\n',
        "a line break in a path": head + '"0\n.png",b\n',
        "a return in a path": head + '"0\r.png",b\n',
        "a zero byte": head + "0\0/0.png,b\n",
        "Latin-1": head.encode() + b"0/0.png,caf\xe9\n",
        "UTF-16": head.encode("utf-16"),
        "broken UTF-8 in the heading": b"image,prod\xffuct\n0/0.png,a\n",
        "half a surrogate": head.encode() + b"0/0.png,\xed\xa0\x80\n",
        "overlong UTF-8": head.encode() + b"0/0.png,\xc0\xaf\n",
        "no heading": "0/0.png,a\n",
        "the same heading twice": "image,image\n0/0.png,a\n",
        "too few cells": head + "0/0.png\n",
        "too many cells": head + "0/0.png,a,b,c\n",
        "text behind a quote": head + '"0/0.png"x,a\n',
        "nothing": b"",
        "blank lines alone": lambda: head + "\n" * 5_000_000,
        "a picture": encoded(Image.new("RGB", (64, 64)), "PNG"),
        "an unknown role": "image,product,role\n0/0.png,a,admin\n",
        "an unknown split": "image,product,split\n0/0.png,a,../../x\n",
    }
    for box in ("nan,0,1,1", "0,0,inf,1", "0,0,-1,1", "1e400,0,1,1", "0,0,0,0", "a,b,c,d", "0,0,1e300,1", "9,,,"):
        texts[f"box {box}"] = f"image,product,box_x,box_y,box_w,box_h\n0/0.png,a,{box}\n"
    for name, text in texts.items():
        yield Hostile("CSV", name, "refused", ("catalog csv",), partial(_write, "in/table.csv", text))


def _paths() -> Iterator[Hostile]:
    tables = {
        "csv": ("in/table.csv", "image,product\n{},a\n"),
        "products10k": ("in/train.csv", "name,class,group\n{},1,2\n"),
        "aicrowd": ("in/gallery.csv", "img_path,product_id\n{},1\n"),
    }
    for reader, (file, form) in tables.items():
        for path in _LEADS:
            if reader == "products10k" and not path.startswith("../../"):
                continue  # its pictures lie a folder deeper, and a path of theirs is always relative
            shown = f"{path[:30]!r} in {reader}"
            put = partial(_write, file, form.format(path))
            yield Hostile("path", shown, "refused", (f"catalog {reader}",), put)


def _link(target: str, name: str, folder: Path) -> None:
    (folder / "in" / "a").mkdir(parents=True, exist_ok=True)
    (folder / "in" / name).symlink_to(target)


def _pipe(folder: Path) -> None:
    (folder / "in" / "a").mkdir(parents=True, exist_ok=True)
    os.mkfifo(folder / "in" / "a" / "0.png")


def _links() -> Iterator[Hostile]:
    roads = ("catalog folder", "catalog pictures")
    targets = ("/etc/passwd", "/dev/zero", "../../../originals/pictures/0/0.png", "/proc/self/environ")
    for target in targets:
        yield Hostile(
            "link", f"a picture that is a link to {target}", "refused", roads, partial(_link, target, "a/0.png")
        )
    for target, name in (("0.png", "a/0.png"), ("../a", "a/0.png"), ("nowhere.png", "a/0.png")):
        put = partial(_link, target, name)
        expected: Any = "refused" if target == "0.png" else "set aside"
        yield Hostile("link", f"a link to {target}", expected, roads, put)
    yield Hostile("link", "a folder that is a link to /etc", "refused", roads, partial(_link, "/etc", "b"))
    yield Hostile("link", "a pipe in a picture's place", "set aside", roads, _pipe)


def _shard(members: list[tuple[tarfile.TarInfo, bytes]], folder: Path, form: int = tarfile.PAX_FORMAT) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for info, data in members:
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data))
    _write("in/0.tar", stream.getvalue(), folder)


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def _shards() -> Iterator[Hostile]:
    picture = encoded(Image.new("RGB", (64, 64)), "PNG")
    good = (_member("good.png"), picture)
    roads = ("catalog webdataset",)

    def aside(name: str, member: tarfile.TarInfo, form: int = tarfile.PAX_FORMAT) -> Hostile:
        put = partial(_shard, [good, (member, picture if member.isreg() else b"")], form=form)
        return Hostile("shard", name, "set aside", roads, put)

    for form, said in ((tarfile.PAX_FORMAT, "pax"), (tarfile.GNU_FORMAT, "GNU")):
        for path in (*_CLIMBS, "x" * 2000 + ".png", "new\nline.png", "not-utf8-\udcff.png", ".hidden.png"):
            yield aside(f"a member {path[:30]!r}, {said}", _member(path), form)
    kinds = {"symbolic": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE}
    for said, kind in kinds.items():
        for target in ("/etc/passwd", "../../../escaped.png", "good.png"):
            yield aside(f"a {said} link to {target}", _member("link.png", kind, target))
    for said, kind in (("pipe", tarfile.FIFOTYPE), ("device", tarfile.CHRTYPE), ("disk", tarfile.BLKTYPE)):
        yield aside(f"a {said}", _member("x.png", kind))
    labels: dict[str, bytes] = {
        "deep nesting": b"[" * 100_000,
        "a huge number": b'{"product": ' + b"9" * 5000 + b"}",
        "a box without end": b'{"product": "a", "box": [0, 0, 1e999, 1]}',
        "a box of a million": b'{"product": "a", "box": [' + b"1," * 100_000 + b"1]}",
        "a product that is a list": b'{"product": ["a"]}',
        "text that steers the terminal": b'{"product": "\\u001b[2J"}',
        "no UTF-8": b'{"product": "\xff"}',
    }
    for name, data in labels.items():
        put = partial(_shard, [good, (_member("good.json"), data)])
        yield Hostile("shard", f"a label of {name}", "refused", roads, put)
    whole: dict[str, bytes] = {
        "a zip that climbs out": _zip("../../escaped.png", picture),
        "a zip of an absolute path": _zip("/tmp/escaped.png", picture),
        "a zip bomb": _zip("x.png", bytes(64 << 20)),
        "HTML": b"<html>" * 500,
        "nothing": b"",
        "a header of 2 GB": _header(tarfile.XHDTYPE, 2 << 30),
        "a long name of 2 GB": _header(tarfile.GNUTYPE_LONGNAME, 2 << 30),
        "a member of 8 GB that is not there": _header(tarfile.REGTYPE, (8 << 30) - 1),
        "extended headers without end": _header(tarfile.XHDTYPE, 12) + (b"12 path=abc\n".ljust(512, b"\0")),
    }
    for name, data in whole.items():
        yield Hostile("shard", f"{name}, named .tar", "refused", roads, partial(_write, "in/0.tar", data))
    extended = _header(tarfile.XHDTYPE, 12) + b"12 path=abc\n".ljust(512, b"\0")
    put = partial(_write, "in/0.tar", lambda: extended * 100_000)
    yield Hostile("shard", "100,000 extended headers, named .tar", "refused", roads, put)
    yield Hostile("shard", "a gzip bomb", "refused", roads, partial(_write, "in/0.tar.gz", b"\x1f\x8b" + bytes(99)))


def _header(kind: bytes, size: int) -> bytes:
    info = _member("x.png", kind)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def _zip(name: str, data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return stream.getvalue()


def _recipes() -> Iterator[Hostile]:
    base = "reader: folder\nroot: shop\n"
    nine = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    nine += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
    texts: dict[str, bytes | str] = {
        "a billion aliases of a list": base + nine,
        "aliases in a value": base + "seed: [&a [x, x], *a, *a]\n",
        "a list that holds itself": base + "seed: &a [*a]\n",
        "merged keys": base + "x: &a {k: 1}\ny: {<<: [*a, *a, *a]}\n",
        "100,000 brackets": base + "seed: " + "[" * 100_000,
        "900 brackets": base + "seed: " + "[" * 900 + "]" * 900,
        "5000 braces": base + "seed: " + "{a: " * 5000 + "}" * 5000,
        "a number to the base of 60": base + "seed: 1" + ":1" * 500_000,
        "a shorter number to the base of 60": base + "seed: 1" + ":1" * 30_000,
        "a million hexadecimal digits": base + "seed: 0x" + "f" * 1_000_000,
        "50,000 hexadecimal digits": base + "seed: 0x" + "f" * 50_000,
        "a million values": base + "seed: [" + "1," * 1_000_000 + "]",
        "text in place of a mapping": "x" * 60_000,
        "not UTF-8": b"reader: \xff\xfe\n",
        "a zero byte": b"reader: \0\n",
        "two documents": "---\na: 1\n---\nb: 2\n",
        "a list in place of a mapping": "[1, 2]",
        "a key that is a list": base + "? [1, 2]\n: b\n",
        "a key that is a number": base + "1: b\n",
        "a recipe that names itself": "config: recipe.yaml\n" + base,
        "a class to import": base + "class_path: os.system\ninit_args: {command: touch escaped}\n",
        "a share without end": base + "validation: .inf\n",
        "a share that is no number": base + "validation: .nan\n",
    }
    tags: tuple[str, ...] = (
        "!!python/object/apply:os.system [touch escaped]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!own x",
    )
    tags += (
        "!!python/object/new:subprocess.Popen [touch escaped]",
        "!!set {a, b}",
        "!!binary aGVsbG8=",
        "!!omap [a: 1]",
    )
    texts |= {f"the tag {tag.split()[0]}": f"{base}seed: {tag}\n" for tag in tags}
    for name, text in texts.items():
        yield Hostile("recipe", name, "refused", ("recipe",), partial(_write, "in/recipe.yaml", text))


def _names() -> Iterator[Hostile]:
    for name in NAMES:
        roads = ("report page", "search page results")
        yield Hostile("name", ascii(name[:40]), "taken", roads, partial(_write, "in/name.txt", name))


def _edit_graph(change: Callable[[onnx.ModelProto], object], folder: Path) -> None:
    path = folder / "fp32" / "model.onnx"
    graph = onnx.load(path)
    change(graph)
    path.write_bytes(graph.SerializeToString())
    sign(folder, "fp32", "model.onnx")


def _outside(lies: dict[str, str], keep: bool, graph: onnx.ModelProto) -> None:
    tensor = graph.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    if not keep:
        tensor.ClearField("raw_data")
    for key, value in lies.items():
        tensor.external_data.add(key=key, value=value)


def _constant(lies: dict[str, str], graph: onnx.ModelProto) -> None:
    """The same in the attribute of a node."""
    tensor = onnx.TensorProto(name="x", dims=[4], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in lies.items():
        tensor.external_data.add(key=key, value=value)
    graph.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["outside"], value=tensor))


def _graphs() -> Iterator[Hostile]:
    roads = ("run by ONNX Runtime", "calibrate")
    places = (*("../card.json", "../../originals/fp32/model.onnx", "/etc/passwd", "/dev/zero", "card.json", ""),)
    for place in (*places, "/proc/self/mem", "a/../../card.json", "~/.bashrc", "file:///etc/passwd"):
        lies = {"location": place, "offset": "0", "length": "4096"}
        change = partial(_outside, lies, False)
        yield Hostile("ONNX", f"weights in {place!r}", "refused", roads, partial(_edit_graph, change))
    for lies in ({"location": "x", "offset": "-1"}, {"location": "x", "length": str(2**63)}, {}):
        change = partial(_outside, lies, True)
        yield Hostile("ONNX", f"weights said to lie outside: {lies}", "refused", roads, partial(_edit_graph, change))
    for place in ("/etc/passwd", "../card.json"):
        change = partial(_constant, {"location": place})
        yield Hostile("ONNX", f"a constant in {place!r}", "refused", roads, partial(_edit_graph, change))

    def dims(graph: onnx.ModelProto) -> None:
        graph.graph.initializer[0].dims[:] = [2**40, 2**20]

    def opset(graph: onnx.ModelProto) -> None:
        graph.opset_import[0].version = 2**40

    def function(graph: onnx.ModelProto) -> None:
        call = onnx.NodeProto(op_type="Again", domain="own", input=["x"], output=["y"])
        graph.functions.append(onnx.FunctionProto(name="Again", domain="own", input=["x"], output=["y"], node=[call]))

    for edit, name in ((dims, "a weight of 2^60 numbers"), (opset, "opset 2^40"), (function, "a function of itself")):
        yield Hostile("ONNX", name, "refused", roads, partial(_edit_graph, edit))
    for name, data in {"a zip": _zip("../x", b"x"), "nothing": b"", "9 MB of ones": b"\xff" * (9 << 20)}.items():
        yield Hostile("ONNX", f"{name}, named .onnx", "refused", roads, partial(_replace, "fp32", "model.onnx", data))


def _replace(artifact: str, file: str, data: bytes, folder: Path) -> None:
    (folder / artifact / file).write_bytes(data)
    sign(folder, artifact, file)


def _edit_header(change: Callable[[dict[str, Any]], object], length: int | None, folder: Path) -> None:
    path = folder / "student" / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = written(header)
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data[8 + size :])
    sign(folder, "student", "model.safetensors")


def _first(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: next(one for name, one in header.items() if name != "__metadata__").update({key: value})


def _weights() -> Iterator[Hostile]:
    roads = ("student embed", "export onnx")
    lies: list[tuple[str, Any]] = [
        ("shape", value) for value in ([2**40, 2**40], [2**63], [-1], [], [1] * 100_000, None)
    ]
    lies += [
        ("data_offsets", value) for value in ([0, 2**63], [0, 2**40], [8, 0], [-8, 0], [0, 0], [2**40, 2**40 + 4], [])
    ]
    lies += [("dtype", value) for value in ("F1", "", None, "F64", "pickle", "BOOL")]
    for key, value in lies:
        name = f"{key} {str(value)[:40]}"
        yield Hostile("safetensors", name, "refused", roads, partial(_edit_header, _first(key, value), None))
    for length in (0, 1, 2**31, 2**40, 2**63, 2**64 - 1):
        put = partial(_edit_header, lambda header: None, length)
        yield Hostile("safetensors", f"a header of {length} bytes", "refused", roads, put)

    def more(header: dict[str, Any]) -> None:
        header.update({f"x{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(100_000)})

    def same(header: dict[str, Any]) -> None:
        names = [name for name in header if name != "__metadata__"]
        header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]

    for change, name in ((more, "100,000 more tensors"), (same, "tensors that overlap"), (dict.clear, "no tensors")):
        yield Hostile("safetensors", name, "refused", roads, partial(_edit_header, change, None))
    for name, data in {"a pickle": b"\x80\x04cos\nsystem\n(S'touch escaped'\ntR.", "a zip": _zip("../x", b"x")}.items():
        put = partial(_replace, "student", "model.safetensors", data)
        yield Hostile("safetensors", f"{name}, named .safetensors", "refused", roads, put)


def _edit_card(artifact: str, path: tuple[str, ...], value: Any, folder: Path) -> None:
    file = folder / artifact / "card.json"
    card = json.loads(file.read_bytes())
    place = card
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_bytes(written(card))
    sign(folder, artifact, "card.json")


def _cards() -> Iterator[Hostile]:
    for path in (("preprocess", "size"), ("embedding", "dim"), ("schema",), ("config", "model", "dim")):
        for value in _HUGE:
            shown = "10^400" if value == 10**400 else str(value)[:24]
            name = f"{'.'.join(path)} {shown} ({type(value).__name__})"
            yield Hostile("card", name, "refused", ("student embed",), partial(_edit_card, "student", path, value))
    for key in ("image_size", "depth", "heads", "mlp_dim", "registers"):
        put = partial(_edit_card, "student", ("config", "model", key), 10**9)
        yield Hostile("card", f"config.model.{key} 10^9", "refused", ("student embed",), put)
    names = ("../../escaped", "/etc/passwd", "..\\escaped", "a/../../../x", "card.json/x", "")
    for name in names:
        entry = {name: {"size": 1, "sha256": "0" * 64}}
        put = partial(_edit_card, "student", ("files",), entry)
        yield Hostile("card", f"a file {name!r}", "refused", ("student embed",), put)
    whole = {
        "5 MB of blanks": b" " * (5 << 20),
        "100,000 brackets": b"[" * 100_000,
        "a number of 100,000 digits": b'{"schema": ' + b"9" * 100_000 + b"}",
        "HTML": b"<html>",
        "not UTF-8": b'{"schema": "\xff"}',
        "nothing": b"",
    }
    for name, data in whole.items():
        put = partial(_write, "student/card.json", data)
        yield Hostile("card", f"{name} in its place", "refused", ("student embed",), put)
    for target in ("/dev/zero", "/etc/passwd", "card.json"):
        yield Hostile("card", f"a link to {target}", "refused", ("student embed",), partial(_replace_by_link, target))


def _replace_by_link(target: str, folder: Path) -> None:
    card = folder / "student" / "card.json"
    card.unlink()
    card.symlink_to(target)


def _towers() -> Iterator[Hostile]:
    """Configurations of a teacher's tower: by a file that someone sent."""
    vision: dict[str, Any] = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
    for key in vision:
        for value in (0, -1, 10**7, 10**30, 0.5, "x", None):
            tower = {"embed_dim": 16, "vision_cfg": {**vision, key: value}}
            if key == "layers" and value == 0:
                continue  # no blocks is a tower all the same
            put = partial(_write, "in/tower.json", written(tower))
            yield Hostile("tower", f"{key} {value}", "refused", ("teacher train",), put)
    whole = {"100,000 brackets": b"[" * 100_000, "a list": b"[1]", "nothing": b"", "not UTF-8": b'{"a": "\xff"}'}
    whole["a number of 5000 digits"] = b'{"embed_dim": ' + b"9" * 5000 + b', "vision_cfg": {}}'
    yield Hostile(
        *("tower", "200 MB of blanks", "refused", ("teacher train",)),
        partial(_write, "in/tower.json", lambda: b" " * (200 << 20)),
    )
    for name, data in whole.items():
        yield Hostile("tower", name, "refused", ("teacher train",), partial(_write, "in/tower.json", data))
