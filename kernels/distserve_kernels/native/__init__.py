"""A whole forward pass of a decoder as one call into C++ (``engine.cpp``), compiled for this processor at first use.

``library`` builds and loads it, ``abi`` mirrors its structures, ``decoder`` holds a model's weights in its layout.
"""
