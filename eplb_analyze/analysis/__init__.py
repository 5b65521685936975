"""One module per question; each returns a report object."""
