"""The instance process: one machine, one engine, one mover, and the threads and streams that host them."""
