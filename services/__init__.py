"""The four services and what they share. They meet on the wire and import nothing of each other."""
