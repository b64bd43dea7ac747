"""The ledger: what it promises, SQLite behind it, and what is made of it."""
