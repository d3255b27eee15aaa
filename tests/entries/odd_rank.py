"""Trains with a different seed on each rank, as a wrong launch script would."""

import os
import sys

from reformer_dist.train import main

sys.argv.append(f"trainer.seed={os.environ['RANK']}")
main()
