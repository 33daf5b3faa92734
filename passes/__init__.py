"""How a model is improved: FX graph in, FX graph out. One pass, one file."""
