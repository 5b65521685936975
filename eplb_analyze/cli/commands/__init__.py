"""The commands, one file each: parse options, call the library, show the report."""
