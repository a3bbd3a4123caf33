"""Drivers that own a whole minimisation: of a function, and of a model's loss."""
