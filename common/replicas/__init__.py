"""One engine that is several, each in a process of its own."""
