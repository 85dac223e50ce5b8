"""What only evaluate.py imports: tables and pictures; and results, a command that keeps and publishes what came of runs."""
