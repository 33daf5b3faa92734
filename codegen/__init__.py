"""With what a model runs: op vocabulary, targets, Triton kernels, specialisation."""
