"""The engine: one rank's model, KV pool and sampler. Runs steps; keeps nothing about requests."""
