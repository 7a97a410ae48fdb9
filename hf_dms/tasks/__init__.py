"""What a model is for: its data, and how its quality is measured."""
