"""Evidence on serving: clients that agree with the exported model, and clients that do not."""
