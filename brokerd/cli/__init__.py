"""The commands `brokerd`, `brokerd check`, `key`, `schema`, `demo` and `health`."""
