"""How good a student is: samples, scores, and the report."""
