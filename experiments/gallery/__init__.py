"""Evidence on stored galleries."""
