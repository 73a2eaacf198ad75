"""Its place makes `reference` and `distributed_workers` importable from every test."""
