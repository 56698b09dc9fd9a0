"""The operators and the decoder on a GPU, beside their peers."""
