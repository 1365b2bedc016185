"""Run the command line: `python -m fastdmd`."""

from fastdmd.cli import main

main()
