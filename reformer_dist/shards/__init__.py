"""The command `reformer-shards`: from raw files to a dataset of tokenized tar shards."""
