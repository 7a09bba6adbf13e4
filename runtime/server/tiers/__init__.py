"""Routes: a name of several tiers, small models before large ones, and what decides which answers.

The models themselves, and the requests to one named model, are in `router/`.
"""
