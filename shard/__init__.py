"""Sharding: plan a TP/PP layout from the parameter table, slice, merge and verify it.

Everything is byte-exact and streams; no tensor arithmetic happens here.
"""
