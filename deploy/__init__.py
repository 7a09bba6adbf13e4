"""Deployment on other systems (Ray Serve, Triton, vLLM), and capacity planning."""
