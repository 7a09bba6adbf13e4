"""Parses an answer's text: stop strings, reasoning, tool calls.

Chat templates are rendered in `common/chat_template.py`, tokens are decoded in `checkpoint/`.
"""
