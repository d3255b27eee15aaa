"""Sweeps: one driver, outside of every job, starts each trial as a job of its own and reads what it leaves."""
