"""Evidence for stored galleries: what they cost, a trial of vector databases, and kills of their commands."""
