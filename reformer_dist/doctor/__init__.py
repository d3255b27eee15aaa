"""`reformer-doctor`: is this machine, or this job, fit to train? Each finding says what to do if it is not."""
