"""Figures of distillation: ablation, sizes, dimensions, time of an epoch and a step."""
