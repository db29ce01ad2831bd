"""The command `segrl`."""
