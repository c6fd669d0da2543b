"""Whether the mimic works: comparison of features, its share of the gradient, summaries and warnings."""
