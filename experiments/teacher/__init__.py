"""Figures of the teacher: ablation, input pipeline, training step."""
