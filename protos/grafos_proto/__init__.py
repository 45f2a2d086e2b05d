"""What is spoken on the wire: the .proto contracts, the code generated from them, and `wire/`."""
