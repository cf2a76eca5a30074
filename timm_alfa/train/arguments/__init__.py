"""The training command's flags: parsing, configuration files, checks."""
