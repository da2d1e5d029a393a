"""`python -m recipes <name> [flags]`."""

from recipes.common.runner import main

if __name__ == "__main__":
    main()
