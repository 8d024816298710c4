"""The machine: processors, memory limits and thread settings."""
