"""What every model and engine costs, and what it keeps: recall, latency, and the report of both."""
