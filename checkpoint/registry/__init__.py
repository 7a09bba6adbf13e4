"""Remote checkpoints: object stores, the Hugging Face hub, MLflow; transfer and signatures."""
