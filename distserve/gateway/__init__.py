"""Takes client requests (gRPC, OpenAI HTTP), tokenizes, owns the client streams."""
