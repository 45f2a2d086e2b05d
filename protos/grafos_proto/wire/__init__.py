"""What is spoken on the wire and is not gRPC, written by hand: used by services and SDK alike."""
