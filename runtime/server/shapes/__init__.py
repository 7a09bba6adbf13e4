"""What answers look like: OpenAI's completions, chats and responses, Anthropic's messages, log probabilities."""
