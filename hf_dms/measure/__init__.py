"""How fast a saved model is, and the versions that it was measured with."""
