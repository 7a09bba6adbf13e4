"""Tool accuracy: cases with tools, asked of a chat API, and their answers checked."""
