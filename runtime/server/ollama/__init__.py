"""Ollama's API (docs/api.md of https://github.com/ollama/ollama): chats, completions, embeddings.

A request is converted to one of OpenAI's, with the same checks, engine and limits. Models are not
pulled, created or deleted through the API.
"""
