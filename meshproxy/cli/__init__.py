"""The commands, a module for each few of them. `command_line.main` runs one."""
