"""Pure: decisions."""
