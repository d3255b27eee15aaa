"""These tests run many tiny operations."""

from support.one_thread import one_thread

__all__ = ["one_thread"]
