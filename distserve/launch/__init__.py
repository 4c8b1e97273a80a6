"""Assembles the processes of a cluster on one machine, and supervises them."""
