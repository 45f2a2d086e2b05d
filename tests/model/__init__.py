"""Small worlds of the lease protocol, searched completely."""
