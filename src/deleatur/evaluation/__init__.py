"""Evaluation of sampled images: predictions of frozen networks, metric values, scores with intervals."""
