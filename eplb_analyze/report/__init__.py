"""The report: one HTML file that works offline, from the figures of the other commands.

``words`` says them in sentences, ``loads`` sums loads over bins of time, ``document`` puts all of it
into one JSON document, ``page`` lays that into the template, ``writing`` makes the file.
"""
