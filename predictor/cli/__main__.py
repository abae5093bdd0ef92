"""Run the command by `python -m predictor.cli`."""

from predictor.cli import main

main()
