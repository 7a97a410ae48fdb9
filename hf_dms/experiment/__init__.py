"""Recipes: one YAML, one experiment, from checks to the finished folder."""
