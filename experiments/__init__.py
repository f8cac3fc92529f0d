"""Evidence that the methods are good: each module measures a claim and records it in ``docs/results``."""
