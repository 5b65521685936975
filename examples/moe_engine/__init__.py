"""A small but real mixture-of-experts engine, served with expert parallelism and recorded with eplb_dump."""
