"""Measuring: load generation, latency metrics, quality scores and the report that joins them.

It measures what is served; it keeps no model code of its own.
"""
