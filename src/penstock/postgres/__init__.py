"""What the broker and the store on PostgreSQL share: addresses, connections, the schema."""
