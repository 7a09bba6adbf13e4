"""The command line: one module a command, the output sink and the error table. No logic."""
