"""Distributed trainer for Reformer models; importing it loads nothing heavy."""

__version__ = "0.1.0"
