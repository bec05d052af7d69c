"""The shell commands; all argument parsing is here. Imports everything but the doors."""
