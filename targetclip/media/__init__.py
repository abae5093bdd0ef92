"""Pictures and clips: reading and writing them, and the faces in them."""
