"""The API of TGI (https://github.com/huggingface/text-generation-inference): generate.

A request is converted to a completion request, with the same checks, engine and limits.
"""
