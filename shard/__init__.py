"""Sharding: plans a TP/PP layout from the parameter table; slices, merges and verifies checkpoints.

Everything is byte-exact and streams; no tensor arithmetic happens here.
"""
