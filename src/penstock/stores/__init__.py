"""Where Penstock remembers: the contract, its adapters, and what is kept in them."""
