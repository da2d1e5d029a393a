"""The producers: one module a method. `python -m recipes --list` names them."""
