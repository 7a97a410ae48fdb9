"""The search as a Trainer, and ordinary training before and after it."""
