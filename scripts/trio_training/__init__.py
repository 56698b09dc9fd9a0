"""How the trio that ships with the package is made: text, tasks, training, evaluation, record."""
