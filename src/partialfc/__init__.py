"""Partial FC: face recognition trained on millions of identities."""
