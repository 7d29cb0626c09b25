"""The commands: one file for each family of commands.

A family's module is imported only when it is used, so that `meshproxy --help` and health checks load no other
libraries. A command's docstring is its help text. Only `Output` prints results.
"""
