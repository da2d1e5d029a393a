"""The operations that run compressed weights: one folder each, reference + C++ + Triton."""
