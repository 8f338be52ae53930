"""Training: data sets, recipes and the loops that run them."""
