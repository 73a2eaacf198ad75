"""Protocols that turn embeddings into scores; they know no training loop."""
