"""Speed, measured: kernels, whole models, other engines beside ours. `python -m recipes.bench`."""
