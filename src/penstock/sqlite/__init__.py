"""One SQLite file in this process: what the broker and the store on it share."""
