"""Tensors in, tensors out. Knows torch and nothing of ours."""
