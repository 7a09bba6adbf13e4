"""Recipes: reading them, planning their memory, disk and time, and running their stages.

It is a separate folder because it imports `bench`, `quant`, `shard` and `runtime`. The recipes
themselves are data, in `recipes/`: they are shipped, and users copy them.
"""
