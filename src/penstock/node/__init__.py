"""The node: what a directory of YAML files defines, hosted."""
