"""Models of other Reformers in our terms, and ours in theirs: configurations, weights, vocabularies."""
