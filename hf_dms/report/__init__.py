"""The results of a prune: numbers, tables, model card, page, figures."""
