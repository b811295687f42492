"""The numbers that five teaching notebooks print, and how each of them is computed here."""
