"""`llmkit bench --mode agentic` replays traces of agents' sessions; `bench trace` makes them."""
