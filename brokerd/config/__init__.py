"""The configuration: YAML in, checked values out, each mistake with file, line and
column.

- ``units`` and ``fields`` define the values that an entry accepts;
- ``model`` defines the form of a configuration;
- ``values`` defines the values that the daemon uses;
- ``file_reader`` opens a file safely, ``text_files`` finds the texts, and ``yaml_reader``
  parses the YAML;
- ``validator`` checks the entries of one file, and ``key_files`` reads keys;
- ``load`` reads all files and collects the results in ``builder``;
- ``messages`` and ``problems`` put mistakes into words;
- ``diff`` compares two configurations for a reload;
- ``listen_addresses`` finds the listen addresses without reading the rest.
"""
