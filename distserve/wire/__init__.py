"""Between core and gRPC: messages there and back, channel settings, statuses. Decides nothing."""
