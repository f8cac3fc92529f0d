"""``make figures TOPIC=gallery``: stored galleries and vector databases, into ``docs/results/gallery.json``.

Parts: ``embeddings`` (after ``make demo``), ``storage``, ``databases``, ``database-kills``. The last two need ``make
other-databases``. Run nothing else during ``storage`` and ``databases``.
"""

from __future__ import annotations

import sys

from experiments.figures import command_of, measure, record
from experiments.gallery.real_embeddings import measure_embeddings
from experiments.gallery.storage import measure_stored
from experiments.gallery.trial import STORES, kill_stores, time_stores


def _measure_databases() -> None:
    figures, rows = time_stores(STORES, command_of("gallery", "databases"))
    record("gallery", figures, {"databases": rows})


def _measure_database_kills() -> None:
    figures, rows = kill_stores(STORES, command_of("gallery", "database-kills"))
    record("gallery", figures, {"database-kills": rows})


PARTS = {
    "embeddings": measure_embeddings,
    "storage": measure_stored,
    "databases": _measure_databases,
    "database-kills": _measure_database_kills,
}

if __name__ == "__main__":
    measure(PARTS, sys.argv[1:])
