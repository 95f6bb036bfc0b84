"""One Redis server: what the broker and the store on it share. The driver is hiredis."""
