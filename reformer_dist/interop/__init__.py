"""Conversion of configurations, weights and vocabularies from and to other Reformer implementations."""
