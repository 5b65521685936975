"""Views: each prints one report object on a console. No figure is computed here."""
