"""Builds all kernels ahead of first use: python -m zoo.kernels.build."""

import os
from concurrent.futures import ThreadPoolExecutor

from .libraries import library, operations

if __name__ == "__main__":
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a thread waits for a compiler
        list(pool.map(library, operations()))
