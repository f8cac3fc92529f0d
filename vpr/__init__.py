"""What every stage of the toolkit shares: catalogue, images, artifacts, embeddings, search, metrics."""

__version__ = "0.1.0"
