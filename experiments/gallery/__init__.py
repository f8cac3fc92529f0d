"""Evidence for the gallery: a trial of vector databases, and kills of its commands."""
