"""Studies: arms, learning rates and seeds to one table."""
