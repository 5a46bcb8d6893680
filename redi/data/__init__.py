"""From raw teacher traces to packed batches: read -> verify -> build, then tokenize -> pack."""
