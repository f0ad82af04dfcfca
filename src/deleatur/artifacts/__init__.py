"""What stages hand to each other: prompts, rated images, tokens, reward heads, and the model that is exported."""
