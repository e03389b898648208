"""The log: events, their levels and formats, and where lines go."""
