"""Redis: admission, settlement, and the directory of keys and templates."""
