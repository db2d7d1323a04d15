"""Trained models for other tools: a folder that plain `transformers` loads, its tokenizer and model card, and ONNX."""
