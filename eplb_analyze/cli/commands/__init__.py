"""The commands, one file each: parse, ask the library, show. No figure is computed here."""
