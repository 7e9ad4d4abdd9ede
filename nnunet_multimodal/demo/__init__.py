"""The demo: phantom to report through the commands that a user types."""
