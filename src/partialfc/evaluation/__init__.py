"""Protocols that turn embeddings into scores, and the statistics they share; they know no training loop."""
