"""Opening models and writing them: headers, tensors, tokenizers, quantized formats, manifests.

Nothing here knows an architecture (that is `llmkit.model`) and nothing imports from other folders.
"""
