"""Plugins that record inside unmodified engines, switched on by EXPERT_LOAD_DUMP_DIR."""
