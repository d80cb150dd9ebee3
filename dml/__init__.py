"""What the work is: data, encoders, losses, metrics and the training loop, in plain PyTorch."""
