"""Diagnostics of a trained model: where its quality comes from.

`context` limits how far a token may look back, `knockout` removes layers, `coverage` compares LSH with exact
attention, and `needles` asks for facts at every length and depth. `training.evaluation` has the loss by position.
"""
