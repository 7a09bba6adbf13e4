"""Engine processes: the process itself, the parent's handle on it, replicas, restarts.

The engine that runs in the process is in `runtime/engine/`.
"""
