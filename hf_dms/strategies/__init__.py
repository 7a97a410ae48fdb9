"""Other ways to choose structure than the search: one-shot criteria, each a small file."""
