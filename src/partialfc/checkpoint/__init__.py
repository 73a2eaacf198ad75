"""Folders of sharded tensors in verified files: `format` below `blocks`, `read` and `write`, in this order."""
