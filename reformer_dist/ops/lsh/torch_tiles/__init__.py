"""LSH and local attention in plain PyTorch, tile by tile, on any device; see `ops.lsh.backends`."""
