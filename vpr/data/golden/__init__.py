"""Eight small images that every exported artifact carries with its embeddings of them; see ``README.md`` here."""

from pathlib import Path

FOLDER = Path(__file__).parent
ATTRIBUTION = "ATTRIBUTION.csv"
# Sorted, so that a client that lists the folder has them in the order of the embeddings.
IMAGES = tuple(sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".jpg", ".png")))
