"""The cluster on a virtual clock: production state machines, latency models as engines, links that fill up."""
