"""Engine processes: the process itself, the handle that its parent holds, several as one, starting them again."""
