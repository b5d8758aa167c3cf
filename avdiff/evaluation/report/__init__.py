"""Reports of a measurement: tables, JSON, CSV and one HTML page."""
