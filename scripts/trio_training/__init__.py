"""How the trio that ships with the package is made: its text, its tasks, recipe and training."""
