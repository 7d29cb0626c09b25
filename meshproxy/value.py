"""What an immutable record derives from.

Its options are inherited, so a compiled module's records keep them: mypyc leaves out what a class is given beside its bases.
"""

from msgspec import Struct


class Value(Struct, frozen=True):
    """A record that can't change and can be hashed."""
