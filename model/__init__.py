"""What a model is: `ModelSpec`, the families, the parameter table and the one decoder.

Quantizing, sharding and serving read these; no model is described anywhere else.
"""
