"""What the tests of a whole gateway are made with: a gateway in this process (`Mesh`) or as `meshproxy serve` (`Gateway`), its
store and its providers, clients, and readers of accounts, logs and metrics. Every wait here has a bound.
"""
