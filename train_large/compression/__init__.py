"""Making a trained model small: uniform quantization, magnitude pruning, and what either leaves to store."""
