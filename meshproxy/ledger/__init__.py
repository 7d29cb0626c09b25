"""The ledger in Redis: admission, settlement, journal, usage, and the directory of accounts, keys and templates."""
