"""Serving one model on several ranks: a process each, which run the same engine in step over their parts.

Nothing here schedules or computes: every rank has the whole scheduler and is told of the same requests.
"""
