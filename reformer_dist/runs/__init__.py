"""Runs on disk: a list, one in detail, and several side by side."""
