"""A load generator for any OpenAI-compatible server: arrivals, an HTTP client, statistics, goodput search."""
