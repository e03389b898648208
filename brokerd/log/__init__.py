"""The log: events, levels, formats and outlets."""
