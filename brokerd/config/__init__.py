"""The configuration: YAML in, plain checked values out, and every mistake with its file, line and column.

``units`` and ``fields`` say what a value may be, ``model`` what a configuration is, ``values`` what the daemon gets;
``files`` opens files, ``document`` reads one YAML text, ``entries`` judges one file, ``keys`` fetches keys, ``load``
goes through the files with ``findings`` in hand; ``complaints`` and ``problems`` put mistakes into words; ``plan``
compares two configurations for a reload; ``addresses`` tells where the broker listens, without reading the rest.
"""
