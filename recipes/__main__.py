"""`python -m recipes <name> [flags]`."""

from recipes.common.core.cli import main

if __name__ == "__main__":
    main()
