"""The experiments of the five notebooks, beside the numbers that the notebooks print."""
