"""Measuring: load generation, latency metrics, quality scores and the report that joins them.

It measures what is served and has no model code.
"""
