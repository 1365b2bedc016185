"""The proof: every method on the tiny worlds, beside its teacher (run.py, report.py)."""
