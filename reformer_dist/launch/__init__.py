"""Starting jobs: the ranks of one machine."""
