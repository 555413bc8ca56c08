"""Encoding of vectors to codes: codebooks, and fast kernels with the same codes as ``rqae.literal``."""
