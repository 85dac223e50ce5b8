"""Tables and pictures for evaluate.py; and results, a command that keeps and publishes what came of runs."""
