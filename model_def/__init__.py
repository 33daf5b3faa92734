"""What is computed: plain PyTorch that reads like the paper."""
