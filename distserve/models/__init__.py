"""Models: configurations, weights and forward passes, each prose for one device. They know no request."""
