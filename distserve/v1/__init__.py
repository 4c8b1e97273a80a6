"""Generated protobuf code, one module per file of ``protos/distserve/v1``. Made by ``python protos/generate.py``."""
