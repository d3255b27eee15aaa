#!/usr/bin/env python3
"""Converts raw files to a dataset for training: the command reformer-shards, from a clone."""

from reformer_dist.shards.__main__ import main

if __name__ == "__main__":
    main()
