"""`python -m llmkit`: the same as the program `llmkit`.

This folder is mapped to the package `llmkit` itself. It has no __init__.py, so `llmkit` stays a
namespace package.
"""

from llmkit.cli.start import main

if __name__ == "__main__":
    main()
