"""Triton kernels of LSH and local attention. Imported only where they are chosen, see `ops.lsh.backends`."""
