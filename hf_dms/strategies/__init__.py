"""Other ways to choose structure than the search, each a small file: docs/strategies.md."""
