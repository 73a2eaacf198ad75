"""The rows of the table of faults, a module for each kind; `benchmarks/faults.py` runs them."""
