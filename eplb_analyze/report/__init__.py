"""One HTML file that works offline, from the figures of the other commands.

``bins`` sums loads over bins of time, ``sentences`` puts figures into words, ``document`` joins both into one
JSON document, ``page`` embeds it in the template, and ``write`` makes the file.
"""
