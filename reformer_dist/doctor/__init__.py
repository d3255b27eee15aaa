"""`reformer-doctor`: checks whether a machine, or a job, is fit to train. Each problem comes with advice."""
