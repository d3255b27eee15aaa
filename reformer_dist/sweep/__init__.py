"""Sweeps: a driver process launches each trial as a separate job and reads its metrics and exit status."""
