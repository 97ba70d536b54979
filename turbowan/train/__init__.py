"""Training: the embedded model's VAE and flow-matching transformer, on PyTorch alone."""
