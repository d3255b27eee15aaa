"""LSH and local attention in plain PyTorch, tile by tile, on any device: `ops.lsh.backends` says when."""
