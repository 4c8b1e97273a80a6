"""Generated protobuf code of the Open Inference Protocol (package ``inference``). Made by ``python protos/generate.py``."""
