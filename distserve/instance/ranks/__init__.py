"""An instance of several ranks: rank 0 is the instance process; the others run their share of every step and move."""
