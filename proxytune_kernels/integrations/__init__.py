"""Proxy-tuning in other stacks; each module imports its own stack, and nothing imports them all."""
