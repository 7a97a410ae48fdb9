"""What a prune came to: numbers, tables, model card, page, figures."""
