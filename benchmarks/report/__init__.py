"""The report: schema, tables, charts, recommendation, HTML page."""
