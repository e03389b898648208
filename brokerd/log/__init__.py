"""The log: events, levels, formats and sinks."""
