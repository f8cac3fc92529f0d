"""Distillation of a teacher's embeddings into a small vit-pytorch ViT."""
