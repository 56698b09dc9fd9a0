"""How expert and anti-expert run: each alone, or both as one batch of two rows a slot."""
