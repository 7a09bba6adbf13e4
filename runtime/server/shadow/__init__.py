"""Shadows: copies of requests to a second model, whose answers are compared and never sent.

The queue, the comparisons and their metrics are here. Which model answers clients is in `router/`.
"""
