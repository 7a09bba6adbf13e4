"""On engines that exist: Ray Serve, Triton, vLLM; and how many machines a load needs."""
