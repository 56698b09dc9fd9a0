"""What steering changes: token by token, over a file of prompts, and from one alpha to the next."""
