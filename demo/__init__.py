"""This machine's readings through a pipeline that is killed twice: `python -m demo`."""
