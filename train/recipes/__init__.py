"""Recipes: read one, plan its steps, run them."""
