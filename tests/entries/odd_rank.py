"""Trains with another seed on each rank: what a careless launch script does."""

import os
import sys

from reformer_dist.train import main

sys.argv.append(f"trainer.seed={os.environ['RANK']}")
main()
