"""Programs that run other tools in separate virtual environments."""
