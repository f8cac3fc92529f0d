"""Evidence for the methods: each module measures a claim and records it in ``docs/results``."""
