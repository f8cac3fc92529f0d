"""Embedded sample of furniture renders; see ``README.md`` in this folder."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

SHARDS = tuple(sorted(Path(__file__).parent.glob("shard-*.parquet")))


def unpack(folder: Path) -> Iterator[dict[str, object]]:
    """Write the sample's images to ``folder/images`` and yield their catalogue rows.

    File names are numbers, so no name in a shard can lead to another folder.
    """
    (folder / "images").mkdir(parents=True)
    number = 0
    for shard in SHARDS:
        for row in pq.read_table(shard).to_pylist():
            image = f"images/{number:05d}.webp"
            (folder / image).write_bytes(row.pop("image"))
            yield {**row, "product": f"home3d/{row['product']}", "image": image, "source": "home3d", "box": None}
            number += 1
