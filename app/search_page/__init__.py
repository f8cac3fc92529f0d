"""The local search page: server, search by uploaded image, and upload limits."""
