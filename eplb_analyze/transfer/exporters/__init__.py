"""Placements and loads as files that other programs read: a module a format, and ``files`` to write them."""

from __future__ import annotations
