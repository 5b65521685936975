"""A local folder or a bucket prefix behind one path type."""
