"""What only evaluate.py uses: statistics and tables, and pictures."""
