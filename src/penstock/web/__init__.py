"""HTTP: a node's work and definitions for programs and people, over `control` and `node`."""
