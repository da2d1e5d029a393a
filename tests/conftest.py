"""What holds for every test: workers share the cores (`pytest -n`)."""

import os

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    os.environ.setdefault("TQDM_DISABLE", "1")
