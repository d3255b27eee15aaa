"""Preparation: documents and samples from raw files, and the writer of datasets."""
