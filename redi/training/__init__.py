"""Training: packed traces in, a model out."""
