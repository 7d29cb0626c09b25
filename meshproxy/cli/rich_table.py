"""Tables for a terminal where `rich` is installed (the extra `meshproxy[rich]`)."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from meshproxy.cli.output import is_number


def show(columns: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    """Print a table; a column of numbers is aligned right."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        numeric = all(is_number(line[index]) for line in body)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for line in body:
        table.add_row(*(Text(cell) for cell in line))
    Console().print(table)
