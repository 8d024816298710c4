"""Commands that measure, each `python -m experiments.<name>`, and what they share."""

import common  # noqa: F401  # first of all, as it lets Ctrl-C end a command quietly while the rest is imported
