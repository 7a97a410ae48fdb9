"""How fast a saved model is."""
