"""Modules with hand-written backward passes, and mistakes to plant in them."""
