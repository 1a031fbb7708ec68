"""The command line: flags and YAML for what Python can do; no logic of its own."""
