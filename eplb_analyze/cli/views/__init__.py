"""What each command shows: a report object in, text on a console out. No figure is computed here."""
