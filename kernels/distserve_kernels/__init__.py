"""The operations a model is made of, one a file; ``ops`` is the face. Nothing here keeps state but packed weights."""
