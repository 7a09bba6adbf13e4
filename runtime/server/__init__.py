"""The OpenAI-compatible server: an API process in front of an engine process.

Text, templates, HTTP and process supervision live here; scheduling does not.
"""
