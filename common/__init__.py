"""The lowest layer, which every folder may use: errors, options, YAML, progress, formatting, HTML.

Nothing here knows what a model or a checkpoint is.
"""
