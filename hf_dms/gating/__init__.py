"""Gates on a model: where they touch it, what a request means, whole sizes from learned ones."""
