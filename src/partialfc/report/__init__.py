"""A run as one page: what was trained, how it went, and how good the model is. See `page.write_report`."""
