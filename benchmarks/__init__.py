"""One question a script; see each docstring's first line."""
