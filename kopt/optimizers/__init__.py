"""One algorithm a file: its paper, its rule, its class."""
