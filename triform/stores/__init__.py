"""Where a model repository may live."""
