import pytest

pytest.importorskip("rich")

from meshproxy.cli import rich_table


def test_a_table_takes_text_as_it_is(capsys):
    rich_table.show(["name", "requests"], [["[red]a[/red]", "12"], ["b", "3"]])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [["name", "requests"], ["[red]a[/red]", "12"], ["b", "3"]] == [line for line in lines if len(line) == 2]
