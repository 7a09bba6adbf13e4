"""`llmkit bench route`: calibrates a route of two tiers, and draws cost against agreement."""
