"""What a model is: one description per architecture, and what follows from it."""
