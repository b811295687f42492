"""The lessons of the five notebooks, and what they share."""
