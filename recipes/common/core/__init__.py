"""What carries every recipe: flags and verbs, the one run, its state, reports, plots, commands."""
