"""Starting jobs: the ranks of this machine, and the files by which others start them."""
