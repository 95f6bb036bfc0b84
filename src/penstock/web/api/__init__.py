"""The routes, thin: read, ask `control`, `cluster` or the book, answer."""
