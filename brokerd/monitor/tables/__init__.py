"""The tables of the monitor's page, and the details of one row."""
