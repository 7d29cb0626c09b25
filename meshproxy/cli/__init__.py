"""The commands. One file a family, imported only when that family is asked for: `meshproxy --help` and a health check
must not wait for libraries they don't use. A command's docstring is its help; what it finds `output` alone prints.
"""
