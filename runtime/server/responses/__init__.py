"""HTTP responses of OpenAI's and Anthropic's APIs, in full and streamed; log probabilities.

Request schemas are in `schemas/`, the formats of the Open Inference Protocol in `kserve/`.
"""
