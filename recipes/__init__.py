"""YAML recipes, one file per outcome, found through `importlib.resources`."""
