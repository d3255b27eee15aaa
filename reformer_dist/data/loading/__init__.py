"""Loading: the data order, rows packed from samples, training and held-out batches, and resumable state."""
