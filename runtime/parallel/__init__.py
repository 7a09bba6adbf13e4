"""One model on several ranks: one process each, which runs the engine on its part.

Nothing here schedules or computes. Every rank has the whole scheduler and gets the same requests,
so that all ranks make the same steps.
"""
