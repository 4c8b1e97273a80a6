"""The gRPC front end: inference, admin, health, reflection, and the Open Inference Protocol."""
