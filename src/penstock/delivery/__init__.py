"""The path of every message: receive, decode, run, settle."""
