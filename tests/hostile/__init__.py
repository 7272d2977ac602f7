"""Files that somebody has made to harm whoever opens them: `python -m tests.hostile`."""
