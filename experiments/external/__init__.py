"""Programs that run other tools in virtual environments of their own."""
