"""FUSE: the source mount with its data protection agent, and the read-only snapshot mount."""
