"""Decides who gets what, and mints the tokens that nodes are bound with. Keeps no state."""
