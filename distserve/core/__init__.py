"""The vocabulary: what the machines speak of. Imports nothing of ours, does no I/O, reads no clock."""
