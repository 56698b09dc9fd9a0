"""The decoder on a GPU: trios of true shapes with random weights, timed against their bytes."""
