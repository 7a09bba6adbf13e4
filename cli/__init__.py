"""The command line: a module and an options class for each command, printing and errors."""
