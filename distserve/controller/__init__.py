"""The controller process: the cluster machine on an asyncio loop behind one gRPC service."""
