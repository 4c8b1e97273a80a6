"""Triton kernels for GPUs, each with the signature of its torch reference (``paged_reference``, and the operations' own
files). Import a module of this package only where Triton is known to be there: ``dispatch`` looks.
"""
