"""Inputs and outputs of stages, loaded: prompts, rated images, tokens, reward heads, the exported model."""
