"""Run the proof: `python -m bench.proof`.

Its functions are in run.py, where processes that are spawned find them.
"""

from bench.proof.run import main

main()
