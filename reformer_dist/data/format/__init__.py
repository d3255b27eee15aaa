"""Datasets on disk: tar shards and their indexes, local and remote storage, tokenizers, reading, verification."""
